"""A decoding step of one layer as one call of `seqkern::transformer_step`, instead of calls of its parts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from seqkern.nn._modules import activation_name, changed, kind_of, patched
from seqkern.nn.attention import MultiheadAttention
from seqkern.nn.cache import KVCache
from seqkern.ops import _backend, _hardware, _surroundings
from seqkern.ops._linear_backends import few_rows
from seqkern.ops.linear import ACTIVATIONS
from seqkern.ops.transformer import op

# The parts of a layer, as torch.nn makes them.
_PARTS: dict[str, type] = {
    **dict.fromkeys(("self_attn", "multihead_attn"), MultiheadAttention),
    **dict.fromkeys(("linear1", "linear2"), nn.Linear),
    **dict.fromkeys(("norm1", "norm2", "norm3"), nn.LayerNorm),
    **dict.fromkeys(("dropout", "dropout1", "dropout2", "dropout3"), nn.Dropout),
}
_OWN = frozenset(
    (*_PARTS, "_sa_block", "_mha_block", "_ff_block")
)  # what a layer has itself is not its class's


class Step(NamedTuple):
    """What a layer gives to its call, but for the input and the cache's own keys and values."""

    heads: tuple[int, int]  #: of its self-attention, and their size
    memory: tuple[Tensor | None, ...]
    rest: tuple[list[Tensor | None], bool, int, list[float]]


def may_be_one_call(x: Tensor) -> bool:
    """Whether a step for x [B, n, E] may be a call for each layer that is plain: one new position of few sequences.

    Not so where dtype or device are no kernel's, a compiler, a transform or autocast is at work, another backend is
    forced, or somebody watches which one runs.
    """
    if torch.compiler.is_compiling() or not _backend.unseen("cpu"):
        return False
    dtype = x.dtype
    if x.shape[1] != 1 or x.shape[0] > few_rows(dtype):
        return False
    if not (_hardware.CPU_READY and x.is_cpu and dtype in _hardware.CPU_DTYPES):
        return False
    return not (torch._C._is_any_autocast_enabled() or _surroundings.in_transform())  # type: ignore[attr-defined]


def prepared(layer: nn.Module, x: Tensor, cache: KVCache, index: int) -> Step | None:
    """The layer's step for x, of which `may_be_one_call` is true; None where only the layer's parts will do.

    That is where layer or parts are no plain modules in eval mode (hooks, classes, parameters or a `_ff_block` of one's
    own, other activations than ReLU and GELU) or dtypes or devices are mixed. There is no gradient.
    """
    if not vars(type(layer)).get("in_one_call"):
        return None
    dtype = x.dtype
    parts: Any = layer._modules
    activation = activation_name(layer.activation)  # type: ignore[arg-type]
    if (
        activation is None
        or (activation == "gelu" and dtype is torch.float64)
        or not is_plain(layer, x.shape[2])
    ):
        return None
    attention, norm = parts["self_attn"], parts["norm1"]
    tensors: list[Any] = [*weights_of_attention(attention), *weights_of(norm)]
    eps = [norm.eps]
    keys = values = hidden = added = None
    norm = parts["norm2"]
    if "multihead_attn" in parts:
        if parts["multihead_attn"].num_heads != attention.num_heads:
            return None
        tensors += *weights_of_attention(parts["multihead_attn"]), *weights_of(norm)
        eps.append(norm.eps)
        keys, values = cache.recall(index)
        hidden, added, _ = cache.memory_seen
        norm = parts["norm3"]
    tensors += *weights_of(parts["linear1"]), *weights_of(parts["linear2"]), *weights_of(norm)
    eps.append(norm.eps)
    strided = torch.strided
    for t in (*tensors, keys, values):
        if t is None:
            continue
        if (
            type(t) not in _surroundings.PLAIN
            or t.dtype is not dtype
            or not t.is_cpu
            or t.layout is not strided
        ):
            return None  # also for text, see weights_of
    if added is not None and added.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        return None
    rest = tensors, bool(layer.norm_first), ACTIVATIONS[activation], eps
    return Step((attention.num_heads, attention.head_dim), (keys, values, hidden, added), rest)


class Kept:
    """The steps of a stack that is plain throughout, for a loop that runs it again and again with one cache: to look at
    every part of every layer takes a fifteenth of a token's time."""

    steps: list[Step] | None = None
    dtype: torch.dtype | None = None  #: of the x that they are for


def steps(
    layers: nn.ModuleList, x: Tensor, cache: KVCache, mask: Tensor | None, kept: Kept | None = None
) -> Tensor:
    """A stack's layers, one after the other, on the new positions x [B, n, E].

    What neighbours give to their calls is gathered before the first of them runs: a layer's weights drive all of
    Python's own out of the caches. What goes by its parts may change those behind it, which are looked at after it.
    """
    if kept is not None and kept.steps and kept.dtype is x.dtype and may_be_one_call(x):
        return _called(kept.steps, x, cache, 0, mask)
    i = 0
    while i < len(layers):
        plain: list[Step] = []
        if may_be_one_call(x):
            for j in range(i, len(layers)):
                step = prepared(layers[j], x, cache, j)
                if step is None:
                    break
                plain.append(step)
            if kept is not None and len(plain) == len(layers):
                kept.steps, kept.dtype = plain, x.dtype
        if plain:
            x = _called(plain, x, cache, i, mask)
            i += len(plain)
        if i < len(layers):
            x = layers[i].step(x, cache, i, mask)  # type: ignore[operator]
            i += 1
    return x


def _called(plain: list[Step], x: Tensor, cache: KVCache, first: int, mask: Tensor | None) -> Tensor:
    """Layers ``first`` and those behind it, each by its call; x [B, 1, E]."""
    row = x[:, 0]
    with torch._C._AutoDispatchBelowAutograd():
        for i, step in enumerate(plain, first):
            own = cache.storage(i, row, *step.heads)
            row = op(row, own, cache.length, mask, *step.memory, *step.rest)
    return row[:, None]


def is_plain(layer: nn.Module, features: int) -> bool:
    """Whether a layer's parts are what torch.nn makes them, and nobody listens: a kernel can compute what they do."""
    if _has_any_global_hook() or patched() or not layer.__dict__.keys().isdisjoint(_OWN):
        return False
    parts: dict[str, Any] = layer._modules
    for name, part in parts.items():
        known = _PARTS.get(name)
        if kind_of(part) is not known:
            if name == "activation":
                continue
            return False
        if known is MultiheadAttention:
            continue
        if changed(part):
            return False
        if known is nn.Dropout and part.training:
            return False
        if known is nn.LayerNorm and part.normalized_shape != (features,):
            return False
    return True


def weights_of(module: nn.Module) -> tuple[Tensor | str | None, Tensor | str | None]:
    """Weight and bias; text for what the module has as something else than a parameter, which parts look up."""
    p = module._parameters
    return p.get("weight", "weight"), p.get("bias", "bias")


def weights_of_attention(attention: nn.Module) -> tuple[Tensor | str | None, ...]:
    p, name = attention._parameters, "in_proj_weight"
    projection: Any = attention._modules["out_proj"]
    return p.get(name, name), p.get("in_proj_bias", "in_proj_bias"), *weights_of(projection)
