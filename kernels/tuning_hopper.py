"""Which calls of attention the Hopper kernels take, and with which blocks: pure data and pure functions.

The rule looks at nothing that differs between batches: a sequence gives the same bits in any of them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.kernels.tuning_attention import Config


class Forward(NamedTuple):
    block_m: int  #: queries of a block, 64 for each warpgroup
    block_n: int  #: keys of a block
    stages: int
    turns: bool = False  #: whether one warpgroup multiplies while the others compute the softmax
    resident: bool = False  #: whether a program stays on a multiprocessor and computes several blocks


# The fastest of those measured on an H200 (docs/decisions.md): (head size, causal) -> Forward.
FORWARD = {
    (64, True): Forward(192, 128, 4, turns=True),
    (64, False): Forward(192, 128, 4),
    (128, True): Forward(128, 128, 2, resident=True),
    (128, False): Forward(128, 128, 2, turns=True, resident=True),
}
KEYS = QUERIES = Config(64, 64, 4, 2)
SHORTEST = 512  # queries and keys of a call: to make the descriptors takes longer than shorter ones gain


def forward_config(size: int, causal: bool) -> Forward:
    return FORWARD[size, causal]


def seen_keys(L: int, S: int, o) -> int:
    """Keys up to the last that a query sees. Those past it may be NaN, and the descriptors end before them."""
    return min(L, S) if o.window_right == 0 and not o.bottom_right else S


def readable(x: Tensor) -> bool:
    """Whether TMA can read and write x: rows of 16-byte pieces, no overlap."""
    steps = [s * x.element_size() for n, s in zip(x.shape[:-1], x.stride()) if n > 1]
    aligned = all(0 < s < 2**40 and s % 16 == 0 for s in steps) and x.data_ptr() % 16 == 0
    return x.numel() > 0 and x.stride(-1) == 1 and aligned


def takes(arch: int, t, o) -> bool:
    """Whether the kernels for Hopper compute a call of `seqkern::attention` or its backward."""
    q, k, v = t.query, t.key, t.value
    if not 90 <= arch < 100 or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    options = (t.mask, t.bias, t.alibi_slopes, t.sinks, t.cu_seqlens_q)
    if any(x is not None for x in options) or o.softcap or o.dropout_p or o.weights or o.scale <= 0:
        return False
    if o.window_left >= 0 or o.window_right > 0:
        return False
    sizes = {q.shape[-1], k.shape[-1], v.shape[-1]}
    fitting = len(sizes) == 1 and sizes <= {64, 128} and min(q.shape[2], k.shape[2]) >= SHORTEST
    return fitting and all(readable(x) for x in (q, k, v))
