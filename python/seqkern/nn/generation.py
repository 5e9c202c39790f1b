"""Incremental decoding of a stack of layers: single steps with a cache, and whole continuations."""

from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqkern.nn._masks import Seen
from seqkern.nn._step import Kept, steps
from seqkern.nn.cache import TO_COME, KVCache


class Generated(NamedTuple):
    """What ``generate`` returns; of one sequence without the batch."""

    tokens: Tensor  #: int64 [B, T], prompt and continuation in one piece, then padding
    lengths: Tensor  #: int64 [B], how many tokens of each row count; an end-of-sequence token does


_DROPPING = (nn.Dropout, nn.MultiheadAttention)


def _check_stack(stack: Any, verb: str) -> None:
    if any(part.training for part in stack.modules() if part is stack or isinstance(part, _DROPPING)):
        raise RuntimeError(
            f"{verb}: the stack is in training mode, or a part of it, where dropout would act; call .eval() first"
        )
    if not stack._is_itself():
        raise TypeError(f"{verb}: {type(stack).__qualname__} has its own forward, which a step would not run")
    for i, layer in enumerate(stack.layers):
        if not hasattr(layer, "_why_no_step"):
            title = f"{type(layer).__module__}.{type(layer).__qualname__}"
            raise TypeError(
                f"{verb}: layer {i} is a {title}, expected seqkern.nn's layer; "
                "seqkern.accelerate(model) swaps torch's own"
            )
        if reason := layer._why_no_step():
            raise TypeError(
                f"{verb}: layer {i} {reason}, which a step cannot reproduce; remove it, or call forward"
            )


def _check_step(x: Tensor, cache: KVCache, padding: Tensor | None, first: int, features: int) -> None:
    """What a step is given, before anything of the cache changes."""
    if x.dim() not in (2, 3):
        raise ValueError(
            f"step: the input is {x.dim()}-D {list(x.shape)}, expected 3-D, or 2-D for one sequence"
        )
    if x.shape[-1] != features:
        raise ValueError(f"step: the input has {x.shape[-1]} features {list(x.shape)}, expected {features}")
    batch = 1 if x.dim() == 2 else x.shape[first]
    fixed = cache.length or (cache.memory is not None and cache.owner is not None)
    if fixed and cache.batch != batch:
        raise ValueError(
            f"step: the input has batch {batch} {list(x.shape)}, expected the cache's {cache.batch}"
        )
    if padding is not None:
        wanted = x.shape[:1] if x.dim() == 2 else (batch, x.shape[1 - first])
        if padding.dtype != torch.bool or tuple(padding.shape) != tuple(wanted):
            raise ValueError(
                f"step: key_padding_mask is {padding.dtype} {list(padding.shape)}, expected torch.bool {list(wanted)}"
            )


def _batch_first(x: Tensor, first: int) -> Tensor:
    """[B, n, E] of a tensor whose batch stands at ``first``, or that has none."""
    return x[None] if x.dim() == 2 else x if first == 0 else x.transpose(0, 1)


def _remember(
    stack: Any, cache: KVCache, memory: Tensor | None, padding: Tensor | None, x: Tensor, first: int
) -> None:
    """Has the cache hold each layer's keys and values of the memory; at the first call only."""
    if cache.memory is not None and cache.owner is not None:  # a first call that failed leaves no owner
        if memory is not None and memory is not cache.memory:
            raise ValueError(
                "step: the cache holds another memory; pass the same tensor or None, or clear the cache"
            )
        return
    if memory is None:
        raise ValueError("step: memory is None in the first call with this cache, expected a tensor")
    if memory.dim() != x.dim() or (x.dim() == 3 and memory.shape[first] != x.shape[first]):
        raise ValueError(
            f"step: memory is {list(memory.shape)} and the input {list(x.shape)}, expected one rank and batch"
        )
    if memory.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"step: memory has {memory.shape[-1]} features {list(memory.shape)}, expected {x.shape[-1]}"
        )
    wide = _batch_first(memory, first)
    seen = Seen()
    if padding is not None:
        wanted = tuple(wide.shape[:2]) if memory.dim() == 3 else tuple(memory.shape[:1])
        known = padding.dtype == torch.bool or padding.is_floating_point()
        if not known or tuple(padding.shape) != wanted:
            raise ValueError(
                f"step: memory_key_padding_mask is {padding.dtype} {list(padding.shape)}, expected bool or "
                f"floating-point {list(wanted)}"
            )
        padding = padding.view(wide.shape[0], 1, 1, wide.shape[1])
        seen = Seen(mask=~padding) if padding.dtype == torch.bool else Seen(bias=padding)
    cache.remember(memory, [layer.multihead_attn.memory_pair(wide) for layer in stack.layers], seen)


@torch.no_grad()
def advance(
    stack: Any,
    x: Tensor,
    cache: KVCache,
    padding: Tensor | None,
    memory: Tensor | None = None,
    memory_padding: Tensor | None = None,
    kept: Kept | None = None,
) -> Tensor:
    """`TransformerEncoder.step` and `TransformerDecoder.step`."""
    if not isinstance(cache, KVCache):
        raise TypeError(f"step: cache is a {type(cache).__name__}, expected a seqkern.nn.KVCache")
    if cache.owner is not stack:
        if cache.owner not in (None, TO_COME):
            raise ValueError(
                "step: the cache belongs to another stack of layers; use a new KVCache, or clear this one"
            )
        _check_stack(stack, "step")
    elif stack.training or any(layer.training for layer in stack.layers):
        _check_stack(stack, "step")
    held = cache.layers
    if cache.owner is not None and held not in (0, len(stack.layers)):
        raise ValueError(
            f"step: the cache holds what {held} layers made and the stack has {len(stack.layers)}; clear the cache"
        )
    attention = stack.layers[0].self_attn
    first = 0 if attention.batch_first else 1
    _check_step(x, cache, padding, first, attention.embed_dim)
    if issubclass(type(stack), nn.TransformerDecoder):
        _remember(stack, cache, memory, memory_padding, x, first)
    rows = _batch_first(x, first)
    count = rows.shape[1]
    mask = cache.open(count, padding if padding is None else padding.view(rows.shape[:2]))
    rows = steps(stack.layers, rows, cache, mask, kept)
    norm: Any = stack.norm
    if norm is not None:
        rows = norm(rows)
    cache.close(count)
    cache.owner = stack
    return rows[0] if x.dim() == 2 else rows if first == 0 else rows.transpose(0, 1)


def _check_options(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, pad: int
) -> None:
    for name, value, kinds, what in (
        ("max_new_tokens", max_new_tokens, int, "a whole number"),
        ("pad", pad, int, "a token"),
        ("temperature", temperature, (int, float), "a number"),
        ("top_k", top_k, (int, NoneType), "a whole number"),
        ("top_p", top_p, (int, float, NoneType), "a number"),
    ):
        if not isinstance(value, kinds):
            raise TypeError(f"generate: {name} is {value!r}, expected {what}")
    if max_new_tokens < 0:
        raise ValueError(
            f"generate: max_new_tokens is {max_new_tokens}, expected a number that is not negative"
        )
    if not temperature >= 0:
        raise ValueError(
            f"generate: temperature is {temperature}, expected a positive number, or 0 for greedy"
        )
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError(
            "generate: top_k and top_p need a temperature above 0, such as 1.0; 0 takes the best token"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"generate: top_k is {top_k}, expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"generate: top_p is {top_p}, expected a probability above 0 and at most 1")


def _checked_lengths(prompt: Tensor, lengths: Tensor | None) -> Tensor:
    """[B], how many tokens of each prompt [B, P] count."""
    if prompt.dtype != torch.int64 or prompt.dim() != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"generate: prompt is {prompt.dtype} {list(prompt.shape)}, expected torch.int64 [batch, tokens] or "
            "[tokens] with at least one token, such as the start token"
        )
    B, P = prompt.shape
    if lengths is None:
        return torch.full((B,), P, device=prompt.device)
    if lengths.dtype != torch.int64 or tuple(lengths.shape) != (B,):
        raise ValueError(
            f"generate: lengths is {lengths.dtype} {list(lengths.shape)}, expected torch.int64 [{B}]"
        )
    if ((lengths < 1) | (lengths > P)).any():
        raise ValueError(
            f"generate: lengths is {lengths.tolist()}, expected numbers from 1 to the {P} of prompt"
        )
    return lengths.to(prompt.device)


def _ends(eos: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor | None:
    """The tokens that end a sequence, [any number]."""
    if eos is None:
        return None
    found = torch.as_tensor([*eos] if isinstance(eos, set | frozenset) else eos, device=device).view(-1)
    if found.numel() and (found.is_floating_point() or found.dtype == torch.bool):
        raise TypeError(f"generate: eos is {eos!r}, expected a token or several")
    return found


def choose_token(
    scores: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row of scores [B, V]: int64 [B]. Options as in `TransformerDecoder.generate`.

    Of tokens with equal scores at the edge of ``top_p`` those that come first stay; at that of ``top_k`` all.
    """
    if temperature == 0:
        return scores.argmax(dim=-1)
    scores = scores.double()  # which a temperature is, too: neither 0 nor infinite where it was not given so
    scores = scores - scores.amax(dim=-1, keepdim=True)
    # What was hidden stays so at a temperature of any height.
    scores = (scores / temperature).masked_fill(scores == -torch.inf, -torch.inf).float()
    if top_k is not None and top_k < scores.shape[-1]:
        least = scores.topk(top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    shares = scores.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        best, order = shares.sort(dim=-1, descending=True, stable=True)
        reached = best.cumsum(dim=-1) - best >= top_p  # before this token; never at the first
        shares = torch.zeros_like(shares).scatter(-1, order, best.masked_fill(reached, 0.0))
    return torch.multinomial(shares, 1, generator=generator).squeeze(-1)


@torch.no_grad()
def generate(
    stack: Any,
    prompt: Tensor,
    embed: Callable[[Tensor, Tensor], Tensor],
    logits: Callable[[Tensor], Tensor],
    max_new_tokens: int,
    lengths: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    eos: int | Sequence[int] | None,
    pad: int,
    generator: torch.Generator | None,
    memory: Tensor | None = None,
    memory_padding: Tensor | None = None,
) -> Generated:
    """`TransformerEncoder.generate` and `TransformerDecoder.generate`."""
    _check_options(max_new_tokens, temperature, top_k, top_p, pad)
    _check_stack(stack, "generate")
    given = {
        "prompt": prompt,
        "memory": memory,
        "lengths": lengths,
        "memory_key_padding_mask": memory_padding,
    }
    for name, x in given.items():
        if not isinstance(x, Tensor) and (x is not None or name == "prompt"):
            raise TypeError(f"generate: {name} is of type {type(x).__name__}, expected a tensor")
    one = prompt.dim() == 1
    prompt = prompt[None] if one else prompt
    if one and lengths is not None and lengths.dim() == 0:
        lengths = lengths[None]
    lengths = _checked_lengths(prompt, lengths)
    (B, P), device = prompt.shape, prompt.device
    first = 0 if stack.layers[0].self_attn.batch_first else 1
    if one and memory is not None:
        memory = memory[None] if first == 0 else memory[:, None]
        memory_padding = memory_padding if memory_padding is None else memory_padding[None]
    at = torch.arange(P, device=device)
    real = at < lengths[:, None]
    padding = None if bool(real.all()) else ~real
    cache, kept = KVCache(capacity=P + max(max_new_tokens - 1, 0)), Kept()
    ends = _ends(eos, device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    added = torch.full((B, max_new_tokens), pad, device=device)
    totals = lengths.clone() if ends is not None else lengths + max_new_tokens

    def run(tokens: Tensor, positions: Tensor, padding: Tensor | None) -> Tensor:
        x = embed(tokens, positions)
        if x.dim() != 3 or x.shape[:2] != tokens.shape:
            raise ValueError(
                f"generate: embed gave {list(x.shape)} for tokens {list(tokens.shape)}, expected "
                f"{[*tokens.shape, 'd_model']}, batch first"
            )
        x = x if first == 0 else x.transpose(0, 1)
        found = advance(stack, x, cache, padding, memory, memory_padding, kept)
        return found if first == 0 else found.transpose(0, 1)

    last = torch.empty(0)
    for i in range(max_new_tokens):
        if i == 0:
            rows = run(prompt, at.expand(B, P), padding)[torch.arange(B, device=device), lengths - 1]
        else:
            rows = run(last[:, None], (lengths + (i - 1))[:, None], None)[:, 0]
        scores = logits(rows)
        if scores.dim() != 2 or scores.shape[0] != B:
            raise ValueError(
                f"generate: logits gave {list(scores.shape)}, expected [{B}, tokens of the vocabulary]"
            )
        last = choose_token(scores, temperature, top_k, top_p, generator)
        if ends is None:
            added[:, i] = last
            continue
        added[:, i] = torch.where(ended, pad, last)
        totals += ~ended
        ended = ended | torch.isin(last, ends)
        if bool(ended.all()):
            break
    tokens = torch.full((B, P + max_new_tokens), pad, device=device)
    tokens[:, :P] = torch.where(real, prompt, pad)
    tokens.scatter_(1, lengths[:, None] + torch.arange(max_new_tokens, device=device), added)
    tokens = tokens[:, : int(totals.max()) if B else P]
    return Generated(tokens[0], totals[0]) if one else Generated(tokens, totals)
