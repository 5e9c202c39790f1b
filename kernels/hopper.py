"""Attention forward on Hopper: blocks of keys and values come by TMA, products run on warpgroups.

For plain calls: 16-bit, one head size of 64 or 128, dense, no option but causal; `fits` says which.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seqkern.kernels.launch import Launch, RowValues, run
from seqkern.kernels.mods import LN2, LOG2E

SHARED_KEYS = 24 * 2**20  # bytes of keys and values that programs in flight read: less than the L2 cache


class Config(NamedTuple):
    variant: str  #: "tma", or "specialized": the compiler gives the loads a warp of their own
    block_m: int  #: queries of a block
    block_n: int  #: keys of a block
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  #: most registers of a thread

    @property
    def name(self) -> str:
        limit = f"-r{self.maxnreg}" if self.maxnreg else ""
        return f"{self.variant}-{self.block_m}x{self.block_n}-w{self.num_warps}-s{self.num_stages}{limit}"


CONFIGS = {
    64: [
        Config("tma", 128, 64, 8, 3),
        Config("tma", 128, 128, 8, 2),
        Config("tma", 128, 128, 8, 3),
        Config("tma", 64, 64, 4, 3),
        Config("tma", 64, 128, 4, 2),
        Config("tma", 64, 128, 4, 3),
    ],
    128: [
        Config("tma", 128, 64, 8, 2),
        Config("tma", 128, 64, 8, 3),
        Config("tma", 128, 128, 8, 2),
        Config("tma", 64, 64, 4, 2),
        Config("tma", 64, 64, 4, 3),
    ],
}


@triton.jit
def place(at, blocks, heads, group):
    """Program -> block of queries, and head counted over all batches.

    The heads come in groups whose keys and values stay in the L2 cache. Within a group the last blocks begin first: of
    a causal call they see most keys.
    """
    section = at // (blocks * group)
    at -= section * (blocks * group)
    size = tl.minimum(group, heads - section * group)
    return blocks - 1 - at // size, section * group + at % size


@triton.jit
def attend(
    acc, m, l, q, k, v, b, h, i, S, d, lo, hi, scale,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EDGE: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """The keys lo..hi for queries q [M, D] at rows i [M, 1]; m in units of q k^T. EDGE: some are hidden."""
    D: tl.constexpr = q.shape[1]
    for first in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIALIZED):
        kk = k.load([b, h, first, 0]).reshape(BLOCK_N, D)
        x = tl.dot(q, kk.T)
        if EDGE:
            j = first + tl.arange(0, BLOCK_N)[None, :]
            see = j < S
            if CAUSAL:
                see = see & (j <= i + d)
            x = tl.where(see, x, -float("inf"))
        top = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(top == -float("inf"), 0.0, top * scale)
        p = tl.exp2(x * scale - shift[:, None])
        fade = tl.exp2(m * scale - shift)
        l = l * fade + tl.sum(p, 1)
        acc = acc * fade[:, None]
        vv = v.load([b, h, first, 0]).reshape(BLOCK_N, D)
        acc = tl.dot(p.to(vv.dtype), vv, acc)
        m = top
    return acc, m, l


@triton.jit
def tma_kernel(
    q, k, v, o, lse, sizes, group, scale,
    CAUSAL: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    B, Hq, G, L, S = sizes
    block, at = place(tl.program_id(0), tl.cdiv(L, BLOCK_M), B * Hq, group)
    b = at // Hq
    h = at % Hq
    first = block * BLOCK_M
    d = 0
    if BOTTOM_RIGHT:
        d = S - L
    hi = S
    full = S // BLOCK_N * BLOCK_N
    if CAUSAL:
        hi = tl.minimum(S, tl.maximum(tl.minimum(first + BLOCK_M, L) + d, 0))
        full = tl.minimum(full, tl.maximum(first + d + 1, 0) // BLOCK_N * BLOCK_N)
    scale = scale * LOG2E
    r = first + tl.arange(0, BLOCK_M)
    i = r[:, None]
    qq = q.load([b, h, first, 0]).reshape(BLOCK_M, D)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    acc, m, l = attend(acc, m, l, qq, k, v, b, h // G, i, S, d, 0, full, scale, BLOCK_N, CAUSAL, False, SPECIALIZED)
    acc, m, l = attend(acc, m, l, qq, k, v, b, h // G, i, S, d, full, hi, scale, BLOCK_N, CAUSAL, True, False)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    acc = tl.where(empty[:, None], 0.0, acc / l[:, None])
    o.store([b, h, first, 0], acc.to(o.dtype).reshape(1, 1, BLOCK_M, D))
    total = tl.where(empty, -float("inf"), (m * scale + tl.log2(l)) * LN2)
    base = b.to(tl.int64) * lse.batch + h.to(tl.int64) * lse.head
    tl.store(lse.p + base + r, total, mask=r < L)


def readable(x: Tensor) -> bool:
    """Whether TMA can read and write x."""
    aligned = all(s > 0 and s * x.element_size() % 16 == 0 for n, s in zip(x.shape[:-1], x.stride()) if n > 1)
    return x.stride(-1) == 1 and aligned and x.data_ptr() % 16 == 0


def fits(t, o, output: Tensor) -> bool:
    """Whether the kernels here compute this call of the op."""
    q, k, v = t.query, t.key, t.value
    extra = (t.mask, t.bias, t.alibi_slopes, t.sinks, t.cu_seqlens_q)
    if any(x is not None for x in extra) or o.softcap or o.dropout_p > 0 or o.scale <= 0:
        return False
    if o.window_left >= 0 or o.window_right > 0 or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    if q.shape[-1] not in CONFIGS or not q.shape[-1] == k.shape[-1] == v.shape[-1]:
        return False
    return 0 not in (*q.shape, *k.shape) and all(readable(x) for x in (q, k, v, output))


def described(x: Tensor, rows: int, block: int) -> tuple:
    """Sizes, strides and block of a descriptor of the first rows of x; rows past them read 0 and are not written."""
    shape = [x.shape[0], x.shape[1], rows, x.shape[3]]
    strides = [s if n > 1 else 8 for n, s in zip(x.shape[:-1], x.stride())]
    return x, shape, [*strides, 1], [1, 1, block, x.shape[3]]


def forward_launch(t, o, output: Tensor, lse: Tensor, config: Config) -> Launch:
    """What `forward` launches: t and o are the op's arguments, output and lse the memory for its results."""
    q, k, v = t.query, t.key, t.value
    (B, Hq, L, D), (_, Hkv, S, _) = q.shape, k.shape
    causal = o.window_right == 0
    # Keys that no query sees may be NaN: they are past the end of the descriptors.
    seen = min(L, S) if causal and not o.bottom_right else S
    together = max(1, SHARED_KEYS // (2 * S * D * q.element_size())) * (Hq // Hkv)
    arguments = dict(
        q=TensorDescriptor(*described(q, L, config.block_m)),
        k=TensorDescriptor(*described(k, seen, config.block_n)),
        v=TensorDescriptor(*described(v, seen, config.block_n)),
        o=TensorDescriptor(*described(output, L, config.block_m)),
        lse=RowValues(lse, lse.stride(0), lse.stride(1)),
        sizes=(B, Hq, Hq // Hkv, L, S),
        group=min(together, B * Hq),
        scale=o.scale,
        CAUSAL=causal,
        BOTTOM_RIGHT=o.bottom_right,
        D=D,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        SPECIALIZED=config.variant == "specialized",
    )
    if config.maxnreg:
        arguments["maxnreg"] = config.maxnreg
    programs = triton.cdiv(L, config.block_m) * Hq * B
    return Launch(tma_kernel, programs, arguments, config.num_warps, config.num_stages)


def forward(t, o, output: Tensor, lse: Tensor, config: Config) -> None:
    """Writes output and lse of a call that `fits`."""
    run(forward_launch(t, o, output, lse, config))
