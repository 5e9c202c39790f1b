"""The linear layer of a few rows, as every step of incremental decoding needs it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.ops import _backend
from seqkern.ops import linear as _declares_the_op  # noqa: F401

__all__ = ["linear"]

_op = torch.ops.seqkern.linear.default


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``torch.nn.functional.linear``, on a kernel that reads the weights once and as they lie where rows are few.

    .. math:: y = x W^\top + b

    Torch's kernel runs for more rows, where a gradient is needed, and under a compiler, which fuses it.

    Args:
        input: [..., K]. weight: [N, K]. bias: [N], or None.

    Returns:
        [..., N].

    Raises: what torch raises: what is not plain is handed to torch's function as it is.

    >>> linear(torch.ones(2, 3), torch.eye(3), torch.arange(3.0))[0]
    tensor([1., 2., 3.])
    """
    tensors = (input, weight) if bias is None else (input, weight, bias)
    if all(isinstance(x, Tensor) for x in tensors) and _fits(input, weight, bias):
        call = (input, weight, bias)
        if _backend.special:
            if _backend.choose(_backend.Call("linear", call)).name == "cpu":
                return _op(input, weight, bias)
        elif _backend.torch_outruns("linear", call) is None and _backend.serves_cpu(call):
            with torch._C._AutoDispatchBelowAutograd():  # no gradient is needed
                return _op(input, weight, bias)
    return F.linear(input, weight, bias)


def _fits(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether sizes and layouts are those of a linear layer; what is wrong with others is torch's to say."""
    if weight.dim() != 2 or input.dim() == 0 or input.is_nested or input.shape[-1] != weight.shape[1]:
        return False
    return bias is None or bias.shape == weight.shape[:1]
