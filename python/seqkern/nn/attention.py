"""MultiheadAttention."""

from typing import Any

import torch
from torch import Tensor

from seqkern.functional import attention, linear
from seqkern.nn import _masks, _nested
from seqkern.nn._modules import has_own_forward, leaf_of_fx
from seqkern.nn.cache import KVCache
from seqkern.ops import _backend, _surroundings


class MultiheadAttention(torch.nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` on the kernels of this package: constructor, parameters, shapes and results are
    torch's.

    .. math:: \mathrm{head}_i = \mathrm{attention}(q W^Q_i, k W^K_i, v W^V_i) \qquad
        y = [\mathrm{head}_1, \dots, \mathrm{head}_h]\, W^O

    Differences, each to the better: a query that sees no key gets the output projection's bias, weights of 0 and no
    gradient, where torch may give NaN; the two masks are never widened to one float for every head; the weights' mean
    over the heads needs no weights of each head where a kernel runs.

    Args:
        embed_dim: E, features of query and output. num_heads: H, which divides E.
        dropout: probability that a weight is dropped in training.
        bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in torch.nn.MultiheadAttention.

    Shapes: query [L, B, E], key [S, B, kdim], value [S, B, vdim] ([B, L, E] … with ``batch_first``, [L, E] … for one
    sequence); key_padding_mask [B, S]; attn_mask [L, S] or [B*H, L, S] -> output as query, and with ``need_weights``
    the weights after dropout, [B, L, S], or [B, H, L, S] without ``average_attn_weights``; else None. In a mask True =
    ignore, a float is added to the scores. ``is_causal`` promises that attn_mask is the causal mask; it is then not
    read, or read only to see whether that is so. A nested tensor (layout torch.strided) is served as torch serves it:
    self-attention with batch_first in eval mode and without gradients.

    Raises:
        AssertionError: ranks, features, lengths or a mask's dtype that do not fit, as in torch.
        RuntimeError: an attn_mask of a wrong size, is_causal without attn_mask, mixed dtypes or devices.

    Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> attention = MultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8)
    >>> output, weights = attention(x, x, x)
    >>> output.shape, weights.shape
    (torch.Size([3, 5, 8]), torch.Size([3, 5, 5]))
    """

    @leaf_of_fx
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        weights = ("mean" if average_attn_weights else "heads") if need_weights else False
        # torch's module gives weights, which the function that stands for it here does not.
        if weights and _backend.special and _backend.forced() == "torch":
            _backend.note(_backend.Call("attention", (query, key, value)), _backend.Choice("torch"))
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query.is_nested or key.is_nested or value.is_nested:
            _nested.check(self, query, key, value, key_padding_mask, attn_mask)
            return _nested.attend(self, query, weights)
        same = self._qkv_same_embed_dim
        _masks.check_inputs(query, key, value, (self.embed_dim, self.kdim, self.vdim), same)
        _masks.check_weights((query, key, value), self.in_proj_weight if same else self.q_proj_weight)
        _masks.check_dtypes(attn_mask, key_padding_mask)
        unbatched = query.dim() == 2
        one = (self.num_heads, query.shape[0], key.shape[0]) if unbatched else ()
        _masks.check_ranks(attn_mask, key_padding_mask, one)
        first = 0 if self.batch_first or unbatched else 1  # where the batch stands
        if unbatched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        if self.batch_first and not unbatched:
            query, key, value = self._copied(query, key, value)
        if same and query is key and key is value:
            three = linear(query, self.in_proj_weight, self.in_proj_bias)
            three = three.view(
                *((1,) if unbatched else ()), *query.shape[:-1], 3, self.num_heads, self.head_dim
            )
            q, k, v = three.permute((2, 0, 3, 1, 4) if first == 0 else (2, 1, 3, 0, 4)).unbind()
        else:
            q, k, v = self._project(query, key, value)
            if unbatched:
                q, k, v = q[None], k[None], v[None]
            if q.shape[first] != k.shape[first]:
                raise RuntimeError(
                    f"MultiheadAttention: query has batch {q.shape[first]} and key {k.shape[first]}, expected one "
                    f"batch in dimension {first} (batch_first={self.batch_first})"
                )
            q, k, v = (self._split(x, first) for x in (q, k, v))
        B, H, L, _ = q.shape
        more_keys = (self.bias_k is not None) + bool(self.add_zero_attn)
        seen = _masks.seen(
            attn_mask,
            key_padding_mask,
            is_causal,
            exact=need_weights,
            more_keys=more_keys,
            sizes=(B, H, L, k.shape[2]),
        )
        if more_keys:
            k, v = self._with_more(k, self.bias_k), self._with_more(v, self.bias_v)
        dropout_p = self.dropout if self.training else 0.0
        found: Any = attention(
            q,
            k,
            v,
            mask=seen.mask,
            bias=seen.bias,
            causal=seen.causal,
            dropout_p=dropout_p,
            return_weights=weights,
        )
        output, shares = found if weights else (found, None)
        output = self._join(output, first)
        if unbatched:
            return output[0], shares if shares is None else shares[0]
        return output, shares

    def _copied(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs, copied where the gradient of a weight reads them: torch copies those whose batch stands first,
        unless it or the length is 1, and callers may write to theirs, as by ``x += attention(x, x, x)[0]``."""
        weights = self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        if torch.compiler.is_compiling() or 1 in inputs[0].shape[:2] or not _surroundings.needs_grad(weights):
            return inputs
        copies: dict[int, Tensor] = {}
        return tuple(
            copies[id(x)] if id(x) in copies else copies.setdefault(id(x), x.clone()) for x in inputs
        )

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., E] each, by as few products as the inputs being one tensor allows."""
        E, b = self.embed_dim, self.in_proj_bias
        if not self._qkv_same_embed_dim:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
            biases = (None, None, None) if b is None else b.split(E)
        elif key is value:
            (of_q, of_kv), (b_q, b_kv) = self._in_proj_parts()
            return linear(query, of_q, b_q), *linear(key, of_kv, b_kv).split(E, dim=-1)  # type: ignore[return-value]
        else:
            weights = self.in_proj_weight.split(E)
            biases = (None, None, None) if b is None else b.split(E)
        q, k, v = (linear(x, w, c) for x, w, c in zip((query, key, value), weights, biases))
        return q, k, v

    def _in_proj_parts(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """in_proj_weight and in_proj_bias, those of the queries and those of keys and values."""
        sizes, b = (self.embed_dim, 2 * self.embed_dim), self.in_proj_bias
        of_q, of_kv = self.in_proj_weight.split(sizes)
        b_q, b_kv = (None, None) if b is None else b.split(sizes)
        return (of_q, of_kv), (b_q, b_kv)

    def _split(self, x: Tensor, first: int) -> Tensor:
        """[B, L, E], or [L, B, E] where the batch stands second, -> [B, H, L, D], a view."""
        heads = x.view(*x.shape[:2], self.num_heads, self.head_dim)
        return heads.transpose(1, 2) if first == 0 else heads.permute(1, 2, 0, 3)

    def _join(self, heads: Tensor, first: int) -> Tensor:
        """[B, H, L, D] -> the output, [B, L, E] or [L, B, E]."""
        x = heads.transpose(1, 2) if first == 0 else heads.permute(2, 0, 1, 3)
        return linear(x.reshape(*x.shape[:2], self.embed_dim), self.out_proj.weight, self.out_proj.bias)

    def _with_more(self, x: Tensor, learned: Tensor | None) -> Tensor:
        """[B, H, S, D] with the learned key or value and one of zeros behind, where the module has them."""
        B, H, _, D = x.shape
        parts = [x]
        if learned is not None:
            parts.append(learned.to(x.dtype).view(1, H, 1, D).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            parts.append(x.new_zeros(B, H, 1, D))
        return torch.cat(parts, dim=2)

    def _why_no_step(self) -> str:
        """Why `attend_own` and `attend_memory` would not compute what `forward` computes; empty if they do."""
        if type(self).forward is not MultiheadAttention.forward or has_own_forward(self):
            return "has its own forward"
        if not self._qkv_same_embed_dim:
            return "has kdim or vdim of its own"
        return (
            "adds keys (add_bias_kv, add_zero_attn)" if self.bias_k is not None or self.add_zero_attn else ""
        )

    def attend_own(self, x: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
        """New positions x [B, n, E] attend to those in the cache and, causally, to themselves; the cache gets them."""
        B, n, _ = x.shape
        three = linear(x, self.in_proj_weight, self.in_proj_bias)
        three = three.view(B, n, 3, self.num_heads, self.head_dim).permute(0, 2, 3, 1, 4)
        k, v = cache.write(layer, three.narrow(1, 1, 2))
        output: Any = attention(
            three.select(1, 0), k, v, mask=mask, causal="bottom-right" if n > 1 else False
        )
        return self._join(output, 0)

    def memory_pair(self, memory: Tensor) -> Tensor:
        """Keys and values [B, 2, H, S, D] of a memory [B, S, E]."""
        (_, of_kv), (_, b_kv) = self._in_proj_parts()
        pair = linear(memory, of_kv, b_kv).unflatten(-1, (2, self.num_heads, self.head_dim))
        return pair.permute(0, 2, 3, 1, 4)

    def attend_memory(self, x: Tensor, cache: KVCache, layer: int) -> Tensor:
        """x [B, n, E] attends to the memory whose keys and values the cache holds."""
        E, b = self.embed_dim, self.in_proj_bias
        q = linear(x, self.in_proj_weight.narrow(0, 0, E), b if b is None else b.narrow(0, 0, E))
        k, v = cache.recall(layer)
        seen = cache.memory_seen
        output: Any = attention(self._split(q, 0), k, v, mask=seen.mask, bias=seen.bias)
        return self._join(output, 0)
