"""The suite ``transformer``: whole stacks of torch.nn, encoding, training and decoding."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqkern.bench.attention import ATTENTION_TRAINING_FLOP, BF16, MOST, OPTION
from seqkern.bench.rows import INFERENCE, MODES, PEERS, TOKENS, TORCH, TRAINING, TRAINING_FLOP, Row
from seqkern.bench.targets import PLAIN, Target

DECODER, GENERATION, LINEAR = "decoder", "generation", "linear"


@dataclass(frozen=True)
class StackRow(Row):
    """A stack of layers, whose products and attentions grow differently in training."""

    suite = "transformer"

    def rivals(self, mode: str) -> frozenset[str]:
        return frozenset({TORCH})

    @abstractmethod
    def _flop(self, linear: float, attention: float) -> float:
        """Multiplications and additions, of each kind so many times those of a forward."""

    def forward_flop(self) -> float:
        return self._flop(1, 1)

    def flop(self, mode: str) -> float:
        return self._flop(TRAINING_FLOP, ATTENTION_TRAINING_FLOP) if mode == TRAINING else self._flop(1, 1)


@dataclass(frozen=True)
class EncoderRow(StackRow):
    """torch.nn.TransformerEncoder on ``[B, L, E]``, without dropout, which could not be compared."""

    mode: str
    B: int
    L: int
    layers: int = 6
    E: int = 384
    heads: int = 12
    ff: int = 1536

    @property
    def modes(self) -> tuple[str, ...]:
        return (self.mode,)

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(
                self.E, self.heads, self.ff, dropout=0.0, activation="gelu", batch_first=True
            )
            model = nn.TransformerEncoder(layer, self.layers).to(self.torch_dtype)
            x = torch.randn(self.B, self.L, self.E).to(self.torch_dtype)
        return model, (x,)

    def depth(self) -> int:
        return self.layers

    def _flop(self, linear: float, attention: float) -> float:
        per_token = linear * 2.0 * (4 * self.E**2 + 2 * self.E * self.ff) + attention * 4.0 * self.L * self.E
        return per_token * self.layers * self.B * self.L

    def target(self, mode: str) -> Target | None:
        if self.group == BF16:
            return Target(1.0, TORCH)
        return Target(1.5 if mode == TRAINING else 1.8, TORCH)


class Causal(nn.Module):
    """A decoder whose targets see what came before them."""

    def __init__(self, decoder: nn.TransformerDecoder, length: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        return self.decoder(x, memory, tgt_mask=self.mask, tgt_is_causal=True)


@dataclass(frozen=True)
class DecoderRow(StackRow):
    """torch.nn.TransformerDecoder on ``[B, L, E]`` with a causal mask and a memory ``[B, S, E]``, without dropout."""

    B: int
    L: int
    S: int
    layers: int = 6
    E: int = 512
    heads: int = 8
    ff: int = 2048

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layer = nn.TransformerDecoderLayer(self.E, self.heads, self.ff, dropout=0.0, batch_first=True)
            model = Causal(nn.TransformerDecoder(layer, self.layers), self.L).to(self.torch_dtype)
            x, memory = (torch.randn(self.B, n, self.E).to(self.torch_dtype) for n in (self.L, self.S))
        return model, (x, memory)

    def depth(self) -> int:
        return self.layers

    def _flop(self, linear: float, attention: float) -> float:
        products = self.L * (6 * self.E**2 + 2 * self.E * self.ff) + self.S * 2 * self.E**2
        pairs = self.L * (self.L / 2 + self.S)
        return (linear * 2.0 * products + attention * 4.0 * self.E * pairs) * self.layers * self.B

    def target(self, mode: str) -> Target | None:
        return Target(1.0, TORCH)


class Block(nn.Module):
    """A decoder's layer as language models write their own: norms first, one head size, no class of a transformer."""

    def __init__(self, E: int, heads: int, ff: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(E) for _ in range(2))
        self.q, self.k, self.v, self.out = (nn.Linear(E, E, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(E, ff), nn.Linear(ff, E)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


@dataclass(frozen=True)
class BlocksRow(StackRow):
    """A decoder of such layers on ``[B, L, E]``, of which seqkern has the linear layers; a position alone as in
    decoding."""

    B: int
    L: int
    layers: int = 6
    E: int = 768
    heads: int = 12
    ff: int = 3072

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.L > 1 else (INFERENCE,)

    def target(self, mode: str) -> Target | None:
        return Target(0.95, TORCH)  # torch's own kernels run some

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layers = [Block(self.E, self.heads, self.ff) for _ in range(self.layers)]
            model = nn.Sequential(*layers, nn.LayerNorm(self.E)).to(self.torch_dtype)
            x = torch.randn(self.B, self.L, self.E).to(self.torch_dtype)
        return model, (x,)

    def depth(self) -> int:
        return self.layers

    def _flop(self, linear: float, attention: float) -> float:
        per_token = linear * 2.0 * (4 * self.E**2 + 2 * self.E * self.ff) + attention * 2.0 * self.L * self.E
        return per_token * self.layers * self.B * self.L


class Weighted(nn.Module):
    """Self-attention that also returns its weights, or does not."""

    def __init__(self, attention: nn.MultiheadAttention, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = attention, weights

    def forward(self, x: Tensor):
        output, weights = self.attention(x, x, x, need_weights=self.weights)
        return output if weights is None else (output, weights)


@dataclass(frozen=True)
class WeightsRow(Row):
    """torch.nn.MultiheadAttention on ``[B, L, E]`` with its weights, their mean over the heads."""

    suite = "transformer"

    B: int
    L: int
    E: int
    heads: int
    weights: bool = True

    @property
    def modes(self) -> tuple[str, ...]:
        return (INFERENCE,)

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            attention = nn.MultiheadAttention(self.E, self.heads, batch_first=True).to(self.torch_dtype)
            x = torch.randn(self.B, self.L, self.E).to(self.torch_dtype)
        return Weighted(attention, self.weights), (x,)

    def rivals(self, mode: str) -> frozenset[str]:
        return frozenset({TORCH, PLAIN})

    def plain(self) -> Row:
        return replace(self, weights=False)

    def forward_flop(self) -> float:
        return (8.0 * self.E**2 + 4.0 * self.L * self.E) * self.B * self.L

    def target(self, mode: str) -> Target | None:
        return Target(1 / MOST["weights"], PLAIN)


class Greedy(nn.Module):
    """Tokens of a decoder, each the one with the highest score: with its cache, where the stack has one."""

    def __init__(self, decoder: nn.TransformerDecoder, width: int, vocabulary: int, count: int) -> None:
        super().__init__()
        self.decoder, self.count = decoder, count
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(count, width)
        self.scores = nn.Linear(width, vocabulary)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.words(tokens) + self.places(positions)

    def forward(self, memory: Tensor, prompt: Tensor) -> Tensor:
        generate: Any = getattr(self.decoder, "generate", None)
        if generate is not None:
            made = generate(prompt, memory, embed=self.embed, logits=self.scores, max_new_tokens=self.count)
            return made.tokens
        tokens = prompt
        for n in range(1, self.count + 1):
            mask = nn.Transformer.generate_square_subsequent_mask(n, dtype=memory.dtype)
            x = self.embed(tokens, torch.arange(n))
            last = self.decoder(x, memory, tgt_mask=mask, tgt_is_causal=True)[:, -1]
            tokens = torch.cat([tokens, self.scores(last).argmax(dim=-1, keepdim=True)], dim=1)
        return tokens


@dataclass(frozen=True)
class GenerationRow(Row):
    """``count`` tokens from torch.nn.TransformerDecoder, which computes every position anew, having no cache."""

    suite = "transformer"

    B: int
    count: int = 64
    S: int = 64  #: positions of the memory
    layers: int = 6
    E: int = 512
    heads: int = 8
    ff: int = 2048
    vocabulary: int = 1000

    @property
    def modes(self) -> tuple[str, ...]:
        return (INFERENCE,)

    @property
    def unit(self) -> str:
        return TOKENS

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            layer = nn.TransformerDecoderLayer(self.E, self.heads, self.ff, dropout=0.0, batch_first=True)
            model = Greedy(nn.TransformerDecoder(layer, self.layers), self.E, self.vocabulary, self.count)
            for p in model.decoder.parameters():  # a fresh stack's layers are copies of one
                if p.dim() > 1:
                    nn.init.xavier_uniform_(p)
            prompt = torch.randint(self.vocabulary, (self.B, 1))
            memory = torch.randn(self.B, self.S, self.E)
        return model.to(self.torch_dtype), (memory.to(self.torch_dtype), prompt)

    def rivals(self, mode: str) -> frozenset[str]:
        return frozenset({TORCH})

    def _weights(self) -> float:
        """Numbers of the weights that a step on a cache multiplies by."""
        return float(self.layers * (6 * self.E**2 + 2 * self.E * self.ff) + self.E * self.vocabulary)

    def forward_flop(self) -> float:
        memory = self.layers * self.B * self.S * 4.0 * self.E**2
        attention = self.layers * self.B * 4.0 * self.E * (self.S + (self.count + 1) / 2) * self.count
        return 2.0 * self._weights() * self.B * self.count + memory + attention

    def amount(self, mode: str) -> float:
        return float(self.B * self.count)

    def bytes_read(self, mode: str) -> float | None:
        return self._weights() * self.torch_dtype.itemsize * self.count if self.B == 1 else None

    def bytes_held(self, mode: str) -> float | None:
        return self._weights() * self.torch_dtype.itemsize

    def target(self, mode: str) -> Target | None:
        return Target(None, read=0.8) if self.B == 1 else Target(15.0, TORCH)


def rows() -> tuple[Row, ...]:
    f32 = "float32"
    return (
        EncoderRow("encoder 6x384 1,128", PEERS, f32, INFERENCE, 1, 128),
        EncoderRow("encoder 6x384 32,64", PEERS, f32, INFERENCE, 32, 64),
        EncoderRow("encoder 6x384 8,128", PEERS, f32, TRAINING, 8, 128),
        GenerationRow("64 tokens, 6x512, batch 1", GENERATION, f32, 1),
        GenerationRow("64 tokens, 6x512, batch 16", GENERATION, f32, 16),
        WeightsRow("weights 4,512,512", OPTION, f32, 4, 512, 512, 8),
        DecoderRow("decoder 6x512 8,64,64", DECODER, f32, 8, 64, 64),
        *(
            BlocksRow(f"{short}nn.Linear 6x768 {B},{L}", LINEAR, dtype, B, L)
            for short, dtype in (("", f32), ("bf16 ", "bfloat16"))
            for B, L in ((1, 1), (4, 1), (16, 1), (4, 128))
        ),
        EncoderRow("bf16 encoder 6x384 32,64", BF16, "bfloat16", INFERENCE, 32, 64),
        EncoderRow("bf16 encoder 6x384 8,128", BF16, "bfloat16", TRAINING, 8, 128),
    )
