"""The linear layer, as the modules of this package need it: few rows in decoding steps, many elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _backend
from seqkern.ops.linear import ACTIVATIONS

__all__ = ["linear"]

_op = torch.ops.seqkern.linear.default
_FUNCTIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    r"""``torch.nn.functional.linear`` and an activation behind it.

    .. math:: y = a(x W^\top + b)

    Few rows are multiplied by a kernel that reads the weights once and as they lie; many by a packed matmul, where it
    is faster than the one that torch has on the machine. Torch's kernel runs elsewhere, and under a compiler, which
    fuses it.

    Args:
        input: [..., K]. weight: [N, K]. bias: [N], or None.
        activation: a: ``"relu"``, ``"gelu"`` (the exact one), or None.

    Returns:
        [..., N].

    Raises: ValueError for another activation; else what torch raises: what is not plain is handed to torch's function
        as it is.

    >>> linear(torch.ones(2, 3), torch.eye(3), torch.tensor([0.0, 1.0, -2.0]), activation="relu")[0]
    tensor([1., 2., 0.])
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"linear: activation is {activation!r}, expected 'relu', 'gelu' or None")
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if not (all(isinstance(x, Tensor) for x in tensors) and _fits(input, weight, bias)):
        return _FUNCTIONS[activation](F.linear(input, weight, bias))
    call = (input, weight, bias)
    grad = _backend.needs_grad(call)
    fused = activation if activation != "gelu" or not (grad or weight.dtype is torch.float64) else None
    if _backend.special:  # another backend is forced for what it has: linear layers stay torch's
        ours = (
            _backend.forced() in (None, "cpu") and _backend.pick(_backend.Call("linear", call)).name == "cpu"
        )
    else:
        ours = _backend.torch_outruns("linear", call) is None and _backend.serves_cpu(call)
    if not ours:
        return _FUNCTIONS[activation](F.linear(input, weight, bias))
    if grad:
        output = _op(input, weight, bias, ACTIVATIONS[fused])
    else:
        with torch._C._AutoDispatchBelowAutograd():
            output = _op(input, weight, bias, ACTIVATIONS[fused])
    return output if fused == activation else _FUNCTIONS[activation](output)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether sizes and layouts are those of a linear layer; what is wrong with others is torch's to say."""
    if weight.dim() != 2 or input.dim() == 0 or input.is_nested or input.shape[-1] != weight.shape[1]:
        return False
    return bias is None or bias.shape == weight.shape[:1]
