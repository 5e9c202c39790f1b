"""Attention with an option as modules: what a user of torch writes, what one of seqkern does, and torch's others."""

import copy
from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqkern.functional import attention, scaled_dot_product_attention

OPTIONS = ("", "mask", "bias", "dropout", "softcap", "alibi", "window", "weights", "sinks", "varlen")
WINDOW = 256  # keys that a query sees, its own included
CAP = 30.0
DROPOUT = 0.1
HIDDEN = 0.1  # of what a mask covers


class Sizes(NamedTuple):
    B: int
    H: int
    L: int
    S: int
    D: int
    kv: int  #: heads of key and value

    def lengths(self) -> list[int]:
        """Of packed sequences: even over an eighth of L to L."""
        return torch.linspace(self.L, max(self.L // 8, 1), self.B, device="cpu").round().long().tolist()


class Asked(nn.Module):
    """What is asked of attention beyond query, key, value and bias; its tensors are drawn from torch's generator."""

    mask: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    dense: Tensor | None
    sinks: Tensor | None
    starts: Tensor | None

    def __init__(self, sizes: Sizes, option: str, causal: bool) -> None:
        super().__init__()
        self.option, self.causal = option, causal
        gap = torch.arange(sizes.S) - torch.arange(sizes.L)[:, None]
        mask = torch.rand(sizes.B, 1, sizes.L, sizes.S) >= HIDDEN if option == "mask" else None
        slopes = 2.0 ** -(torch.arange(1, sizes.H + 1) * 8 / sizes.H) if option == "alibi" else None
        seed = torch.tensor([1]) if option == "dropout" else None
        sinks = torch.randn(sizes.H) if option == "sinks" else None
        starts = None  # of packed sequences, and their end
        self.ends: list[int] = []
        self.longest = None
        if option == "varlen":
            self.ends = torch.tensor([0, *sizes.lengths()], device="cpu").cumsum(0).tolist()
            self.longest = max(sizes.lengths())
            starts = torch.tensor(self.ends, dtype=torch.int32)
        dense = None  # [L, S] or [1, H, L, S]: the option written out
        if option == "window":
            dense = (gap <= 0) & (gap > -WINDOW)
        elif slopes is not None:
            dense = (-slopes[:, None, None] * gap.abs())[None]
        buffers = {
            "mask": mask,
            "slopes": slopes,
            "seed": seed,
            "dense": dense,
            "sinks": sinks,
            "starts": starts,
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def of_heads(self, heads: Sequence[int]) -> "Asked":
        """The same of some heads of the query alone."""
        found = copy.copy(self)
        found._buffers = dict(self._buffers)
        for name, dim in (("slopes", 0), ("sinks", 0), ("dense", 1)):
            value = self._buffers[name]
            if value is not None and not (name == "dense" and value.dim() == 2):
                found._buffers[name] = value.index_select(dim, torch.tensor(heads, device=value.device))
        return found


class ByTorch(nn.Module):
    """torch's attention with the option as a mask, or, where it has no such thing, matmul and softmax."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None):
        a = self.asked
        if a.option == "varlen":
            parts = [
                self.one(*(x[i:j].transpose(0, 1)[None] for x in (q, k, v))) for i, j in pairwise(a.ends)
            ]
            return torch.cat([each[0].transpose(0, 1) for each in parts])
        if a.option in ("softcap", "weights", "sinks"):
            scores = q @ k.mT * q.shape[-1] ** -0.5
            if a.sinks is not None:
                sinks = a.sinks[:, None, None].expand(*scores.shape[:-1], 1)
                return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1] @ v
            weights = (CAP * torch.tanh(scores / CAP) if a.option == "softcap" else scores).softmax(dim=-1)
            return (weights @ v, weights.mean(dim=1)) if a.option == "weights" else weights @ v
        return self.one(q, k, v, bias)

    def one(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        a = self.asked
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
            sinks=a.sinks,
            cu_seqlens_q=a.starts,
            cu_seqlens_k=a.starts,
            max_seqlen_q=a.longest,
            max_seqlen_k=a.longest,
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


class ByKernel(nn.Module):
    """A module whose attention torch runs by one kernel, or refuses."""

    def __init__(self, model: nn.Module, kernel: str) -> None:
        from torch.nn.attention import SDPBackend

        super().__init__()
        self.model = model
        self.kernel = getattr(SDPBackend, "MATH" if kernel == "math" else f"{kernel.upper()}_ATTENTION")

    def forward(self, *inputs: Tensor):
        from torch.nn.attention import sdpa_kernel

        with sdpa_kernel(self.kernel):
            return self.model(*inputs)


class ByVarlen(nn.Module):
    """torch's attention of packed sequences."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, q: Tensor, k: Tensor, v: Tensor):
        from torch.nn.attention.varlen import varlen_attn

        a = self.asked
        causal: dict[str, Any] = {}
        if a.causal:
            by_name = "is_causal" in signature(varlen_attn).parameters  # until torch 2.11
            causal = {"is_causal": True} if by_name else {"window_size": (-1, 0)}
        return varlen_attn(q, k, v, a.starts, a.starts, a.longest, a.longest, **causal)  # type: ignore[arg-type]


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

            self.blocks = flex.create_block_mask(
                seen, None, None, sizes.L, sizes.S, device=torch.get_default_device().type
            )
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
