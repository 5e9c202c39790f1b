"""This package's operators in ``torch.utils.flop_counter.FlopCounterMode``, which counts as 0 what it does not know.

Importing this module registers formulas and changes nothing else. torch itself knows none for its LSTM and
its attention on a CPU; of a model on torch's kernels those count as 0 there.

>>> import torch, seqkern
>>> import seqkern.integrations.flop_counter
>>> from torch.utils.flop_counter import FlopCounterMode
>>> layer = seqkern.nn.LSTM(3, 4)
>>> with FlopCounterMode(display=False) as counter:
...     _ = layer(torch.randn(5, 2, 3))
>>> counter.get_total_flops() == 2 * (5 * 2) * (4 * 4) * (3 + 4)
True

Counted is as torch counts: two for each multiplication and addition of a matrix product, nothing for what is done
number by number, and all pairs of queries and keys whatever a mask, ``causal`` or a window leaves out. Gradients of
attention take five products with the scores that are computed anew. Sequences of unequal length count with their own
lengths. Under a counter, as under any mode of torch's dispatcher, calls go by these operators, never by shorter ways;
what the backends "torch" and "reference" do is counted by torch's own formulas.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from seqkern.ops import attention as _attention_op  # noqa: F401  (importing these makes the operators)
from seqkern.ops import linear as _linear_op  # noqa: F401
from seqkern.ops import rnn as rnn_op
from seqkern.spec.attention import Options, Tensors

_ARGUMENTS = Tensors._fields + Options._fields
_ops = torch.ops.seqkern


def _counts(op: Any) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Registers what is given the call's arguments themselves, with what it returned as ``out_val``."""
    return register_flop_formula(op, get_raw=True)


def _weights(names: dict[str, Any]) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """w_ih, w_hh and w_hr of each direction."""
    return [
        (names["w_ih" + end], names["w_hh" + end], names["w_hr" + end])
        for end in ("", "_reverse")
        if names["w_ih" + end] is not None
    ]


@_counts(_ops.rnn_forward)
def _rnn_forward(*args: Any, out_val: Any = None, **_: Any) -> int:
    names = dict(zip(rnn_op.TENSORS, args, strict=False))
    rows = prod(names["input"].shape[:-1])
    matrices = [w for each in _weights(names) for w in each if w is not None]
    return 2 * rows * sum(w.numel() for w in matrices)


@_counts(_ops.rnn_backward)
def _rnn_backward(*args: Any, out_val: Any = None, **_: Any) -> int:
    names = dict(zip(rnn_op.TENSORS, args[5:], strict=False))
    need_input, need_weights = args[-2:]
    rows = prod(names["input"].shape[:-1])
    macs = 0
    for w_ih, *scanned in _weights(names):
        through = sum(w.numel() for w in scanned if w is not None)
        macs += through + need_input * w_ih.numel() + need_weights * (w_ih.numel() + through)
    return 2 * rows * macs


def _lengths(cu_seqlens: Tensor | None, of_one: int, longest: int) -> list[int]:
    """How many rows each sequence has: ``of_one`` where they are dense, the longest where none is known yet."""
    if cu_seqlens is None:
        return [of_one]
    if cu_seqlens.device.type == "meta" or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return [longest] * (len(cu_seqlens) - 1)
    return cu_seqlens.diff().tolist()


def _pairs(names: dict[str, Any]) -> int:
    """Pairs of a query and a key, over all heads and sequences."""
    query, key = names["query"], names["key"]
    cu_q, cu_k = names["cu_seqlens_q"], names["cu_seqlens_k"]
    own = _lengths(cu_q, query.shape[-2], names["max_seqlen_q"])
    others = _lengths(cu_k, key.shape[-2], names["max_seqlen_k"])
    heads = query.shape[-2] if cu_q is not None else prod(query.shape[:-2])
    return heads * sum(q * k for q, k in zip(own, others, strict=True))


@_counts(_ops.attention)
def _attention(*args: Any, out_val: Any = None, **_: Any) -> int:
    names = dict(zip(_ARGUMENTS, args, strict=False))
    return 2 * _pairs(names) * (names["query"].shape[-1] + names["value"].shape[-1])


@_counts(_ops.attention_backward)
def _attention_backward(*args: Any, out_val: Any = None, **_: Any) -> int:
    names = dict(zip(_ARGUMENTS, args[5:], strict=False))
    return 2 * _pairs(names) * (3 * names["query"].shape[-1] + 2 * names["value"].shape[-1])


@_counts(_ops.linear)
def _linear(input: Tensor, weight: Tensor, *_: Any, out_val: Any = None, **__: Any) -> int:
    return 2 * prod(input.shape[:-1]) * weight.numel()


@_counts(_ops.mm)
def _mm(a: Tensor, b: Tensor, *, out_val: Any = None) -> int:
    return 2 * a.numel() * b.shape[1]
