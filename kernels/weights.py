"""The weights of attention as a result, per head or as the mean over the heads, from a forward's log-sum-exp."""

import torch
import triton
import triton.language as tl

from seqkern.kernels.attention_backward import denominator
from seqkern.kernels.launch import Launch, operand, prepare, run
from seqkern.kernels.mods import drop, kept, rows, score, shown, weights_again
from seqkern.kernels.tuning_attention import weights_block


@triton.jit
def weights_kernel(
    q, k, out, lse, mods, sizes, scale,
    MEAN: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of [L, S] weights after dropout, of one head or summed over all heads of a batch."""
    L, S, Hq, G = sizes
    columns_of = tl.cdiv(S, BLOCK_N)
    rows_of = tl.cdiv(L, BLOCK_M)
    heads = 1 if MEAN else Hq
    at = tl.program_id(0)
    first_key = at % columns_of * BLOCK_N
    row = at // columns_of % rows_of
    h_out = at // columns_of // rows_of % heads
    b = at // columns_of // rows_of // heads
    d = 0
    if BOTTOM_RIGHT:
        d = S - L
    r = row * BLOCK_M + tl.arange(0, BLOCK_M)
    c = first_key + tl.arange(0, BLOCK_N)
    i, j = r[:, None], c[None, :]
    inside = (i < L) & (j < S)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for each in range(0, Hq if MEAN else 1):
        h = h_out + each
        base_q = b.to(tl.int64) * q.batch + h.to(tl.int64) * q.head
        base_k = b.to(tl.int64) * k.batch + (h // G).to(tl.int64) * k.head
        qq = rows(q.p + base_q, r.to(tl.int64) * q.row, r < L, D, BLOCK_D)
        kk = rows(k.p + base_k, c.to(tl.int64) * k.row, c < S, D, BLOCK_D)
        x, _ = score(tl.dot(qq, tl.trans(kk), input_precision=PRECISION), b, h, i, j, d, inside, scale, mods)
        logsum = denominator(lse, b, h, 0, r, L, mods)[:, None]
        w = tl.where(shown(b, h, i, j, d, inside, mods), weights_again(x, logsum, mods), 0.0)
        if mods.seed is not None:
            w = drop(w, kept(b, h, i, first_key, mods, BLOCK_N, False), mods)
        total += w
    if MEAN:
        total = total / Hq
    base = (b.to(tl.int64) * heads + h_out) * L * S
    tl.store(out + base + i.to(tl.int64) * S + j, total.to(out.dtype.element_ty), mask=inside)


def weights_launch(t, o, lse: torch.Tensor, out: torch.Tensor) -> Launch:
    call = prepare(t, o)
    block = weights_block(call.shape)
    constants = {name: x for name, x in call.constants.items() if "DV" not in name}
    arguments = dict(
        q=operand(call.q),
        k=operand(call.k),
        out=out,
        lse=call.row_values(lse),
        mods=call.mods,
        sizes=(call.L, call.S, call.Hq, call.G),
        scale=o.scale,
        MEAN=o.weights == "mean",
        BOTTOM_RIGHT=o.bottom_right,
        **constants,
        BLOCK_M=block,
        BLOCK_N=block,
    )
    tiles = triton.cdiv(call.L, block) * triton.cdiv(call.S, block)
    return Launch(weights_kernel, tiles * call.B * (1 if o.weights == "mean" else call.Hq), arguments, 4, 1)


def weights(t, o, lse: torch.Tensor, out: torch.Tensor) -> None:
    """Writes the third result of the op `seqkern::attention`, given its second."""
    run(weights_launch(t, o, lse, out))
