"""An encoder layer without a gradient, as few calls as it has products.

torch's addmm writes the bias before it multiplies and an activation, a residual connection and a norm are passes over
memory of their own; here one pass behind a product does all of that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.functional.linear import linear
from seqkern.ops import _backend
from seqkern.ops.linear import ACTIVATIONS, direct_linear

_ending = torch.ops.seqkern.ending_.default


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Layer(NamedTuple):
    """Weight and bias of each product, and both norms."""

    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    norms: tuple[Norm, Norm]
    norm_first: bool
    activation: str  # of `ACTIVATIONS`


def encoder_layer(x: Tensor, layer: Layer, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """x [..., E] through a layer whose attention makes [..., E] of [..., 3 E]; inputs and parameters are plain tensors
    of one dtype, and nothing takes a gradient."""
    run = _by_parts if lacks_kernel(x, layer.activation) else _in_few_calls
    return run(x, layer, attend)


def lacks_kernel(x: Tensor, activation: str) -> bool:
    """Whether the products of a layer must be followed by torch's functions."""
    if not (_backend.CPU_READY and x.is_cpu and x.dtype in _backend.CPU_DTYPES and x.numel()):
        return True
    if activation == "gelu" and x.dtype is torch.float64:
        return True
    return not _backend.unseen("cpu") or _backend.is_looked_on()


def _by_parts(x: Tensor, layer: Layer, attend: Callable[[Tensor], Tensor]) -> Tensor:
    # In place where the memory is new, as torch's path: there is no gradient to keep anything for.
    def attention(x: Tensor) -> Tensor:
        return linear(attend(linear(x, *layer.qkv)), *layer.out)

    def feed(x: Tensor) -> Tensor:
        return linear(linear(x, *layer.up, layer.activation), *layer.down)

    for block, norm in zip((attention, feed), layer.norms):
        x = block(norm(x)).add_(x) if layer.norm_first else norm(block(x).add_(x))
    return x


def _in_few_calls(x: Tensor, layer: Layer, attend: Callable[[Tensor], Tensor]) -> Tensor:
    first, norms = layer.norm_first, layer.norms
    rows = x.reshape(-1, x.shape[-1])
    seen = norms[0](rows) if first else rows
    heads = attend(_with_bias(seen, *layer.qkv).view(*x.shape[:-1], -1))
    rows = _product(heads.reshape(rows.shape), *layer.out, None, rows, None if first else norms[0])
    inner = _product(norms[1](rows) if first else rows, *layer.up, layer.activation)
    return _product(inner, *layer.down, None, rows, None if first else norms[1]).view(x.shape)


def _with_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _backend.torch_outruns("linear", (x, weight, bias)):
        return F.linear(x, weight, bias)
    return direct_linear(x, weight, bias, 0)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """norm(residual + activation(x W^T + bias)) of rows."""
    what = ACTIVATIONS[activation]
    if _backend.torch_outruns("linear", (x, weight, bias)):
        y = torch.mm(x, weight.t())
    else:
        y = direct_linear(x, weight, bias, what)
        what, bias = 0, None
        if residual is None:
            return y
    if residual is None and bias is None and not what:
        return y
    _ending(y, bias, what, residual, *(norm or (None, None, None)))
    return y
