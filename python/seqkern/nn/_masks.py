"""torch.nn's masks, checked at the door and turned into what `functional.attention` takes.

torch.nn says True = ignore and has two masks that may be bool or float; attention says True = attend and keeps what
shows apart from what is added. Nothing here has a size for the heads unless the caller's mask has one.
"""

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.ops import _surroundings


class Seen(NamedTuple):
    """What the queries see: the arguments ``mask``, ``bias`` and ``causal`` of `functional.attention`."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    causal: bool = False


def check_inputs(
    query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, int, int], packed: bool
) -> None:
    """Ranks and sizes of what a module with features ``sizes`` attends with; ``packed``: one weight projects all."""
    rank = query.dim()
    if rank not in (2, 3):
        raise AssertionError(
            f"MultiheadAttention: query is {rank}-D {list(query.shape)}, expected 3-D, or 2-D for one sequence"
        )
    for name, x in (("key", key), ("value", value)):
        if x.dim() != rank:
            raise AssertionError(
                f"MultiheadAttention: query is {rank}-D and {name} {x.dim()}-D {list(x.shape)}, expected one rank; "
                "add the batch with .unsqueeze"
            )
    if query.shape[-1] != sizes[0]:
        raise AssertionError(
            f"MultiheadAttention: query has {query.shape[-1]} features, expected embed_dim = {sizes[0]}"
        )
    if key.shape[:-1] != value.shape[:-1] or (packed and key.shape != value.shape):
        raise AssertionError(
            f"MultiheadAttention: key is {list(key.shape)} and value {list(value.shape)}, expected one length and batch"
        )
    for name, x, size in (("key", key, sizes[1]), ("value", value, sizes[2])):
        if x.shape[-1] != size:
            kind = RuntimeError if packed else AssertionError
            wanted = "embed_dim" if packed else "kdim" if name == "key" else "vdim"
            raise kind(f"MultiheadAttention: {name} has {x.shape[-1]} features, expected {wanted} = {size}")


def check_weights(inputs: tuple[Tensor, Tensor, Tensor], weight: Tensor | None) -> None:
    """One dtype, unless autocast is on."""
    if weight is None or torch._C._is_any_autocast_enabled():  # type: ignore[attr-defined]
        return
    for name, x in zip(("query", "key", "value"), inputs):
        if x.dtype != weight.dtype:
            raise RuntimeError(
                f"MultiheadAttention: {name} is {x.dtype} and the weights are {weight.dtype}, expected one dtype; "
                f"convert it with {name}.to({weight.dtype})"
            )


def check_dtypes(attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> None:
    for name, x in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(
                f"MultiheadAttention: {name} is of type {type(x).__name__}, expected a tensor or None"
            )
        if x is not None and x.dtype != torch.bool and not x.is_floating_point():
            raise AssertionError(
                f"MultiheadAttention: {name} is {x.dtype}, expected bool (True = ignore) or floating-point (added to "
                "the scores); use .bool()"
            )
    if attn_mask is not None and key_padding_mask is not None and attn_mask.dtype != key_padding_mask.dtype:
        warnings.warn(
            "Support for mismatched key_padding_mask and attn_mask is deprecated. Use same type for both instead.",
            stacklevel=4,
        )


def check_ranks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, unbatched: tuple[int, ...]
) -> None:
    """``unbatched`` is (heads, L, S) of one sequence, empty of a batch."""
    rank = 1 if unbatched else 2
    if key_padding_mask is not None and key_padding_mask.dim() != rank:
        raise AssertionError(
            f"MultiheadAttention: key_padding_mask is {key_padding_mask.dim()}-D {list(key_padding_mask.shape)}, "
            f"expected {'[keys] for one sequence' if unbatched else '[batch, keys]'}"
        )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"MultiheadAttention: attn_mask is {attn_mask.dim()}-D {list(attn_mask.shape)}, expected "
                "[queries, keys] or [batch * heads, queries, keys]"
            )
        if unbatched and attn_mask.dim() == 3 and tuple(attn_mask.shape) != unbatched:
            raise AssertionError(
                f"MultiheadAttention: attn_mask is {list(attn_mask.shape)}, expected {list(unbatched)} "
                "(heads, queries, keys) for one sequence"
            )


def is_causal_mask(mask: Tensor) -> bool:
    """Whether a mask [L, S] hides each query's later keys and nothing else; False also where it is not looked at.

    It is looked at where that costs little: on a CPU, outside of a compiler and of function transforms.
    """
    if torch.compiler.is_compiling() or type(mask) not in _surroundings.PLAIN or mask.dim() != 2:
        return False
    if not (mask.dtype == torch.bool or mask.is_floating_point()):  # an error, and for the layers to say
        return False
    if not mask.is_cpu or _surroundings.in_transform():
        return False
    hidden = True if mask.dtype == torch.bool else -torch.inf
    return torch.equal(mask, torch.full_like(mask, hidden, requires_grad=False).triu_(1))


def told_causal(mask: Tensor | None, hint: bool | None, x: Tensor, layers: Iterable[torch.nn.Module]) -> bool:
    """A stack's hint for its layers: the caller's, or what the mask of x's length says where it can be looked at."""
    if hint is not None or mask is None:
        return bool(hint)
    length = mask.shape[0] if mask.dim() else 0
    if not x.is_nested:
        attention = getattr(next(iter(layers), None), "self_attn", None)
        length = x.shape[1 if x.dim() == 3 and getattr(attention, "batch_first", False) else 0]
    return tuple(mask.shape) == (length, length) and is_causal_mask(mask)


def seen(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    *,
    exact: bool,
    more_keys: int,
    sizes: tuple[int, int, int, int],
) -> Seen:
    """Both masks of a batch together.

    ``is_causal`` is torch's promise that ``attn_mask`` is the causal mask. Where torch itself goes by the promise, so
    do we; where it goes by the mask (``exact``, or with key_padding_mask) the mask is looked at first, and stays one if
    it takes a gradient.

    Args:
        attn_mask: [L, S] or [B*H, L, S].
        key_padding_mask: [B, S].
        more_keys: keys after S that every query sees.
        sizes: B, H, L, S.
    """
    B, H, L, S = sizes
    is_causal = bool(is_causal)  # which torch takes as None, too
    if is_causal and attn_mask is None:
        raise RuntimeError(
            "MultiheadAttention: is_causal is given without attn_mask, which it only describes; give the causal "
            "mask too, torch.nn.Transformer.generate_square_subsequent_mask(length)"
        )
    causal = is_causal and not exact and key_padding_mask is None
    if is_causal and not causal and not more_keys and tuple(attn_mask.shape) == (L, S):  # type: ignore[union-attr]
        causal = not _surroundings.needs_grad((attn_mask,)) and is_causal_mask(attn_mask)  # type: ignore[arg-type]
    found: dict[str, Tensor] = {}
    if attn_mask is not None and not causal:
        if tuple(attn_mask.shape) not in ((L, S), (B * H, L, S)):
            raise RuntimeError(
                f"MultiheadAttention: attn_mask is {list(attn_mask.shape)}, expected {[L, S]} (queries, keys) or "
                f"{[B * H, L, S]} (batch * heads, queries, keys)"
            )
        _join(found, attn_mask if attn_mask.dim() == 2 else attn_mask.view(B, H, L, S))
    if key_padding_mask is not None:
        if tuple(key_padding_mask.shape) != (B, S):
            raise AssertionError(
                f"MultiheadAttention: key_padding_mask is {list(key_padding_mask.shape)}, expected {[B, S]} "
                "(batch, keys)"
            )
        _join(found, key_padding_mask[:, None, None])
    mask, bias = found.get("mask"), found.get("bias")
    if more_keys:
        mask, bias = (
            x if x is None else torch.nn.functional.pad(x, (0, more_keys), value=v)
            for x, v in ((mask, True), (bias, 0.0))
        )
    return Seen(mask, bias, causal)


def _join(found: dict[str, Tensor], mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        shown = mask.logical_not()
        found["mask"] = shown & found["mask"] if "mask" in found else shown
    else:
        found["bias"] = mask + found["bias"] if "bias" in found else mask
