"""The checks at the door of attention: torch's exception types, raised before anything is computed."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkern.spec.attention import Options, Tensors

NAME = "attention"
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, Tensor)  # a tensor of one number passes for it


def check_options(t: Tensors, o: Options, return_weights) -> None:
    """Numbers and words, and the tensors' dtypes and devices."""
    given: list[tuple[str, Any]] = [
        each
        for each in zip(Tensors._fields, t)
        if each[1] is not None or each[0] in ("query", "key", "value")
    ]
    for name, x in given:
        if not isinstance(x, Tensor):
            name = "dropout_seed" if name == "seed" else name
            raise TypeError(f"{NAME}: {name} is of type {type(x).__name__}, expected a tensor")
    for name in ("scale", "softcap", "dropout_p"):
        if not isinstance(x := getattr(o, name), _NUMBERS):
            raise TypeError(f"{NAME}: {name} is {x!r}, expected a number")
        if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
            advice = "multiply query by it and give scale=1.0" if name == "scale" else "give its .item()"
            raise TypeError(
                f"{NAME}: {name} is a tensor that requires a gradient, for which there is none; {advice}"
            )
    query = t.query
    if not query.is_floating_point() or query.itemsize == 1:
        raise RuntimeError(
            f"{NAME}: query is {query.dtype}, expected a floating-point dtype of 16 bits or more; "
            "use .to(dtype)"
        )
    for name, x in given:
        if x.device != query.device:
            raise RuntimeError(
                f"{NAME}: query is on {query.device} and {name} on {x.device}, expected one device; "
                "move them with .to(device)"
            )
        if name in ("key", "value") and x.dtype != query.dtype:
            raise RuntimeError(
                f"{NAME}: query is {query.dtype} and {name} {x.dtype}, expected one dtype; use .to(dtype)"
            )
        if name == "mask" and x.dtype != torch.bool:
            raise RuntimeError(
                f"{NAME}: mask is {x.dtype}, expected torch.bool (True = attend); "
                "what is to be added to the scores goes into bias"
            )
        if name in ("bias", "alibi_slopes", "sinks") and not x.is_floating_point():
            raise RuntimeError(f"{NAME}: {name} is {x.dtype}, expected a floating-point dtype")
    if not 0 <= o.dropout_p <= 1:
        raise RuntimeError(f"{NAME}: dropout_p is {o.dropout_p}, expected a probability between 0 and 1")
    if not 0 <= o.softcap < math.inf:
        raise ValueError(f"{NAME}: softcap is {o.softcap}, expected a positive number, or 0 for none")
    if return_weights not in (False, "heads", "mean"):
        raise ValueError(f"{NAME}: return_weights is {return_weights!r}, expected False, 'heads' or 'mean'")
    if t.seed is not None and (t.seed.dtype != torch.int64 or t.seed.numel() != 1):
        raise RuntimeError(
            f"{NAME}: dropout_seed is {t.seed.dtype} {list(t.seed.shape)}, expected one torch.int64; "
            "draw one with torch.randint(2**62, (1,), device=query.device)"
        )


def check_shapes(t: Tensors) -> None:
    """Shapes of a call whose mask and bias are still as the caller gave them."""
    q, k, v = t.query, t.key, t.value
    packed = t.cu_seqlens_q is not None or t.cu_seqlens_k is not None
    rank = 3 if packed else 4
    for name, x in zip(Tensors._fields, (q, k, v)):
        if x.dim() != rank:
            layout = "[total, heads, size] with cu_seqlens" if packed else "[batch, heads, length, size]"
            raise RuntimeError(
                f"{NAME}: {name} is {x.dim()}-D {list(x.shape)}, expected {rank}-D {layout}"
                + ("" if packed else "; packed input comes with cu_seqlens_q and cu_seqlens_k")
            )
    heads = 1
    if k.shape[:-1] != v.shape[:-1]:
        raise RuntimeError(
            f"{NAME}: key is {list(k.shape)} and value {list(v.shape)}, expected all sizes but the last to agree"
        )
    if q.shape[-1] != k.shape[-1]:
        raise RuntimeError(
            f"{NAME}: query has head size {q.shape[-1]} {list(q.shape)} and key {k.shape[-1]} {list(k.shape)}, "
            "expected one head size"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise RuntimeError(
            f"{NAME}: query has batch {q.shape[0]} and key {k.shape[0]}, expected one batch; "
            "repeat the smaller with .expand"
        )
    if q.shape[heads] != k.shape[heads] and (k.shape[heads] == 0 or q.shape[heads] % k.shape[heads]):
        raise RuntimeError(
            f"{NAME}: query has {q.shape[heads]} heads and key {k.shape[heads]}, expected the heads of key to divide "
            "those of query"
            + f" in the layout {'[total, heads, size]' if packed else '[batch, heads, length, size]'}"
        )


def check_extras(t: Tensors, batch: int, L: int, S: int) -> None:
    """Mask, bias, slopes and sinks against the sizes of the call."""
    Hq = t.query.shape[1]
    full = (batch, Hq, L, S)
    for name, x in (("mask", t.mask), ("bias", t.bias)):
        if x is not None and (
            x.dim() > 4 or any(n not in (1, m) for n, m in zip(reversed(x.shape), reversed(full)))
        ):
            raise RuntimeError(
                f"{NAME}: {name} is {list(x.shape)}, which does not broadcast to {list(full)} "
                "(batch, heads of query, queries, keys)"
            )
    if t.alibi_slopes is not None and t.alibi_slopes.shape not in ((Hq,), (batch, Hq)):
        raise RuntimeError(
            f"{NAME}: alibi_slopes is {list(t.alibi_slopes.shape)}, expected [{Hq}] or [{batch}, {Hq}]"
        )
    if t.sinks is not None and t.sinks.shape != (Hq,):
        raise RuntimeError(
            f"{NAME}: sinks is {list(t.sinks.shape)}, expected [{Hq}], one for each head of query"
        )


def check_cu_seqlens(name: str, cu: Tensor | None, total: int, rows: str) -> None:
    """The form of one cu_seqlens; its values are read by `sequence_lengths`."""
    if cu is None:
        raise RuntimeError(
            f"{NAME}: {name} is missing, expected both cu_seqlens_q and cu_seqlens_k or neither"
        )
    if cu.dtype not in (torch.int32, torch.int64) or cu.dim() != 1 or cu.shape[0] < 1:
        raise RuntimeError(
            f"{NAME}: {name} is {cu.dtype} {list(cu.shape)}, expected torch.int32 [batch + 1]: "
            f"0, where each next sequence begins, and the total of {total} {rows}"
        )


def sequence_lengths(name: str, cu: Tensor, total: int, rows: str) -> list[int]:
    """The lengths of the packed sequences; reads the values, so a GPU is waited for."""
    at: Sequence[int] = cu.tolist()
    if at[0] != 0 or at[-1] != total or any(a > b for a, b in itertools.pairwise(at)):
        raise RuntimeError(
            f"{NAME}: {name} is {at}, expected to begin at 0, never to descend, and to end at the {total} {rows}; "
            "make it with torch.nn.functional.pad(lengths.cumsum(0), (1, 0))"
        )
    return [b - a for a, b in itertools.pairwise(at)]
