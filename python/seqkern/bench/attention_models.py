"""Attention with an option as modules: what a user of torch writes, what one of seqkern does, and FlexAttention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqkern.functional import attention, scaled_dot_product_attention

OPTIONS = ("", "mask", "bias", "dropout", "softcap", "alibi", "window", "weights")
WINDOW = 256  # keys that a query sees, its own included
CAP = 30.0
DROPOUT = 0.1
HIDDEN = 0.1  # of what a mask covers
TORCH_MASKS = ("alibi", "window")  # options that torch's attention is given as a mask


class Sizes(NamedTuple):
    B: int
    H: int
    L: int
    S: int
    D: int
    kv: int  #: heads of key and value


class Asked(nn.Module):
    """What is asked of attention beyond query, key, value and bias; its tensors are drawn from torch's generator."""

    mask: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    dense: Tensor | None

    def __init__(self, sizes: Sizes, option: str, causal: bool) -> None:
        super().__init__()
        self.option, self.causal = option, causal
        gap = torch.arange(sizes.S) - torch.arange(sizes.L)[:, None]
        mask = torch.rand(sizes.B, 1, sizes.L, sizes.S) >= HIDDEN if option == "mask" else None
        slopes = 2.0 ** -(torch.arange(1, sizes.H + 1) * 8 / sizes.H) if option == "alibi" else None
        seed = torch.tensor([1]) if option == "dropout" else None
        dense = None  # [L, S] or [1, H, L, S]: the option written out
        if option == "window":
            dense = (gap <= 0) & (gap > -WINDOW)
        elif slopes is not None:
            dense = (-slopes[:, None, None] * gap.abs())[None]
        for name, value in (("mask", mask), ("slopes", slopes), ("seed", seed), ("dense", dense)):
            self.register_buffer(name, value)


class ByTorch(nn.Module):
    """torch's attention with the option as a mask, or, where it has no such thing, matmul and softmax."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        a = self.asked
        if a.option in ("softcap", "weights"):
            scores = q @ k.mT * q.shape[-1] ** -0.5
            weights = (CAP * torch.tanh(scores / CAP) if a.option == "softcap" else scores).softmax(dim=-1)
            return (weights @ v, weights.mean(dim=1)) if a.option == "weights" else weights @ v
        mask = bias[None] if bias is not None else a.mask if a.mask is not None else a.dense
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=DROPOUT if a.option == "dropout" else 0.0,
            is_causal=a.causal and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )


class BySeqkern(nn.Module):
    """`seqkern.functional.attention`, by the backend that it chooses or by one that is forced."""

    def __init__(self, asked: Asked, backend: str | None = None) -> None:
        super().__init__()
        self.asked, self.backend = asked, backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        a = self.asked
        return attention(
            q,
            k,
            v,
            mask=a.mask,
            bias=bias,
            causal=a.causal,
            window=(WINDOW - 1, 0) if a.option == "window" else None,
            softcap=CAP if a.option == "softcap" else 0.0,
            alibi_slopes=a.slopes,
            dropout_p=DROPOUT if a.option == "dropout" else 0.0,
            dropout_seed=a.seed,
            return_weights="mean" if a.option == "weights" else False,
            backend=self.backend,
        )


class ByDoor(nn.Module):
    """`seqkern.functional.scaled_dot_product_attention`, torch's own signature."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=self.causal)


class ByFlex(nn.Module):
    """Compiled FlexAttention: causal and window as a block mask, softcap and ALiBi on the scores."""

    def __init__(self, asked: Asked, sizes: Sizes) -> None:
        from torch.nn.attention import flex_attention as flex

        super().__init__()
        self.call = torch.compile(flex.flex_attention, dynamic=False)
        self.blocks = self.on_scores = None
        slopes = asked.slopes
        if asked.causal:
            width = WINDOW if asked.option == "window" else sizes.S

            def seen(b, h, i, j):
                return (j <= i) & (i - j < width)

            self.blocks = flex.create_block_mask(seen, None, None, sizes.L, sizes.S, device="cpu")
        if asked.option == "softcap":
            self.on_scores = lambda score, b, h, i, j: CAP * torch.tanh(score / CAP)
        elif slopes is not None:
            self.on_scores = lambda score, b, h, i, j: score - slopes[h] * (j - i).abs()

    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        return self.call(
            q,
            k,
            v,
            score_mod=self.on_scores,
            block_mask=self.blocks,
            enable_gqa=q.shape[1] != k.shape[1],
        )
