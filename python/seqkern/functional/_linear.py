"""The linear layer, as the modules of this package need it: few rows in decoding steps, many elsewhere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _backend, _surroundings
from seqkern.ops.linear import ACTIVATIONS, direct_linear

__all__ = ["linear"]

_op = torch.ops.seqkern.linear.default
ACTIVATION_OF = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}
_IN_PLACE = {"relu": torch.relu_, "gelu": torch.ops.aten.gelu_.default}


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
    if _may_not_be_saved(input, weight, bias):
        input = input.clone()
    if not _is_ours(input, weight, bias):
        output = F.linear(input, weight, bias)
        if activation is None:
            return output
        return (_IN_PLACE if _is_nobodys(output, input, weight, bias) else ACTIVATION_OF)[activation](output)
    if not input.is_contiguous() and _surroundings.needs_grad((input, weight, bias)):
        input = input.contiguous()  # torch saves such a copy too, so that callers may write to theirs
    exact = activation == "gelu" and (
        weight.dtype is torch.float64 or _surroundings.needs_grad((input, weight, bias))
    )
    fused = None if exact else activation
    run = _op if _surroundings.is_looked_on() else direct_linear
    output = run(input, weight, bias, ACTIVATIONS[fused])
    return output if fused == activation else ACTIVATION_OF[activation](output)


def _may_not_be_saved(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether an input is an inference tensor that torch's backward would want; torch's modules copy it by chance."""
    if torch.compiler.is_compiling() or not (isinstance(input, Tensor) and input.is_inference()):
        return False
    return not torch.is_inference_mode_enabled() and _surroundings.needs_grad((weight, bias))


def _is_nobodys(output: Tensor, *made_of: Tensor | None) -> bool:
    """Whether torch made an output just now, and nobody can have kept it: then it may be written again."""
    if output.requires_grad or output.layout is not torch.strided or _surroundings.is_looked_on():
        return False
    plain = all(t is None or type(t) in _surroundings.PLAIN for t in (output, *made_of))
    return plain and torch._C._len_torch_function_stack() == 0  # type: ignore[attr-defined]


def _is_ours(input, weight, bias) -> bool:
    call = (input, weight, bias)
    if not _is_matrix(input, weight):
        return False
    if not _backend.special:  # the rule comes first: a small layer is over before more is asked
        return not _backend.torch_outruns("linear", call) and _fits(*call) and _backend.serves_cpu(call)
    return _fits(*call) and _choice(*call).name == "cpu"


def _is_matrix(input, weight) -> bool:
    if not (isinstance(weight, Tensor) and isinstance(input, Tensor)):
        return False
    return weight.dim() == 2 and not input.is_nested


def _choice(input: Tensor, weight: Tensor, bias: Tensor | None) -> _backend.Choice:
    if _backend.forced() not in (None, "cpu"):
        return _backend.Choice("torch")  # another one is forced for what it has: linear layers stay torch's
    return _backend.pick(_backend.Call("linear", (input, weight, bias)))


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether sizes and layouts are those of a linear layer; what is wrong with others is torch's to say."""
    if input.dim() == 0 or input.shape[-1] != weight.shape[1]:
        return False
    return bias is None or (isinstance(bias, Tensor) and bias.shape == weight.shape[:1])


def show(input, weight, bias) -> None:
    """Tells `explain` which backend `linear` takes, which itself does not: layers call it for their parts."""
    if _is_matrix(input, weight) and _fits(input, weight, bias):
        _backend.note(_backend.Call("linear", (input, weight, bias)), _choice(input, weight, bias))
