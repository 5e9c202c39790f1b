"""A layer of a Transformer without a gradient in few calls: its products, attentions, and what follows each product.

torch's addmm writes the bias before it multiplies and an activation, a residual connection and a norm are passes over
memory of their own; here one pass behind a product does all of that.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkern.functional._linear import linear
from seqkern.ops import _backend, _hardware, _surroundings
from seqkern.ops.linear import ACTIVATIONS, direct_linear

_ending = torch.ops.seqkern.ending_.default


class Norm(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


Product = tuple[Tensor, Tensor | None]  # weight and bias


class Attention(NamedTuple):
    """The products before and behind an attention; what it makes [..., E] of is [..., 3 E], or of queries alone
    [..., E]."""

    into: Product
    out: Product
    attend: Callable[[Tensor], Tensor]


class Layer(NamedTuple):
    """One attention or two, the feed-forward's products, and the norm of each of them."""

    attentions: tuple[Attention, ...]
    up: Product
    down: Product
    norms: tuple[Norm, ...]
    norm_first: bool
    activation: str  # of `ACTIVATIONS`


def whole_layer(x: Tensor, layer: Layer) -> Tensor:
    """x [..., E] through a layer; inputs and parameters are plain tensors, and nothing takes a gradient."""
    short = may_be_short(x, layer.activation) and fits(x, layer)
    return (in_few_calls if short else _by_parts)(x, layer)


def may_be_short(x: Tensor, activation: str) -> bool:
    """Whether the products of a layer may be followed by a kernel of ours, past torch's functions."""
    if _backend.special or _surroundings.is_looked_on():
        return False
    if torch._C._len_torch_function_stack() > 0:  # type: ignore[attr-defined]  # whose modes may keep what is returned
        return False
    if not (_hardware.CPU_READY and x.is_cpu and x.dtype in _hardware.CPU_DTYPES and x.numel()):
        return False
    return x.layout is torch.strided and not (activation == "gelu" and x.dtype is torch.float64)


def fits(x: Tensor, layer: Layer) -> bool:
    """Whether parameters are what torch's constructors make: of x's dtype, and of sizes that nothing broadcasts."""
    E, F_ = x.shape[-1], layer.up[0].shape[0]
    wide = 3 * E  # of the first attention, to which x alone gives all
    expected = [(layer.up, F_, E), (layer.down, E, F_)]
    for each in layer.attentions:
        expected += (each.into, wide, E), (each.out, E, E)
        wide = E
    tensors = [
        (t, size) for (w, b), rows, columns in expected for t, size in ((w, (rows, columns)), (b, (rows,)))
    ]
    for t, size in (*tensors, *((t, (E,)) for norm in layer.norms for t in norm[:2])):
        if t is not None and (
            t.shape != size or t.dtype is not x.dtype or not t.is_cpu or t.layout is not torch.strided
        ):
            return False
    return F_ > 0


def _by_parts(x: Tensor, layer: Layer) -> Tensor:
    # In place where the memory is new, as torch's path: there is no gradient to keep anything for.
    def attended(part: Attention, x: Tensor) -> Tensor:
        return linear(part.attend(linear(x, *part.into)), *part.out)

    def feed(x: Tensor) -> Tensor:
        return linear(linear(x, *layer.up, layer.activation), *layer.down)

    blocks = (*(partial(attended, part) for part in layer.attentions), feed)
    for block, norm in zip(blocks, layer.norms):
        x = block(norm(x)).add_(x) if layer.norm_first else norm(block(x).add_(x))
    return x


def in_few_calls(x: Tensor, layer: Layer) -> Tensor:
    first = layer.norm_first
    rows = x.reshape(-1, x.shape[-1])
    for part, norm in zip(layer.attentions, layer.norms):
        seen = norm(rows) if first else rows
        heads = part.attend(with_bias(seen, *part.into).view(*x.shape[:-1], -1))
        rows = _product(heads.reshape(rows.shape), *part.out, None, rows, None if first else norm)
    norm = layer.norms[-1]
    inner = _product(norm(rows) if first else rows, *layer.up, layer.activation)
    # No view, which could not be written to once gradients are enabled again.
    return torch.ops.aten._unsafe_view.default(
        _product(inner, *layer.down, None, rows, None if first else norm), x.shape
    )


def with_bias(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    if not _backend.torch_outruns("linear", (x, weight, bias)):
        y = direct_linear(x, weight, bias, what)
        if residual is None:
            return y
        what, bias = 0, None
    elif x.dtype is torch.float16:  # which a sum without its bias may leave
        y, bias = F.linear(x, weight, bias), None
    else:
        y = torch.mm(x, weight.t())
    if residual is None and bias is None and not what:
        return y
    _ending(y, bias, what, residual, *(norm or (None, None, None)))
    return y
