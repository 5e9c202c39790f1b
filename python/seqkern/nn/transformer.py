"""The Transformer of torch.nn: layers, stacks of them, and both stacks together.

torch's constructors build torch's parts; those become ours here, with the parameters that they were given. torch's
encoder layers run its native path in eval mode, past the modules that they hold; layers of both kinds go past them here
where nobody would notice (`_whole`).
"""

from collections.abc import Callable, Mapping
from functools import wraps
from inspect import signature

import torch
from torch import Tensor, nn

from seqkern.functional import linear
from seqkern.functional._linear import ACTIVATION_OF
from seqkern.nn import _masks
from seqkern.nn._modules import activation_name, has_own_forward, leaf_of_fx, unheard
from seqkern.nn._whole import Hidden, Memory, in_few_calls
from seqkern.nn.attention import MultiheadAttention
from seqkern.nn.cache import KVCache
from seqkern.nn.generation import Generated, advance, generate
from seqkern.ops import _surroundings


def _adopt(module: nn.Module) -> None:
    """Makes a module and those within it ours where they are torch's own attention and transformer modules."""
    ours = {cls.__base__: cls for cls in (MultiheadAttention, *_PARTS)}
    for each in module.modules():
        if type(each) in ours:
            object.__setattr__(each, "__class__", ours[type(each)])


def _residual(layer, x: Tensor, *blocks: tuple[nn.Module, Callable[[Tensor], Tensor]]) -> Tensor:
    """Each block around its residual connection, behind its norm (norm_first) or before it."""
    for norm, block in blocks:
        x = x + block(norm(x)) if layer.norm_first else norm(x + block(x))
    return x


def _linear(module: nn.Module, x: Tensor, activation: str | None = None) -> Tensor:
    if unheard(module, nn.Linear):
        return linear(x, module.weight, module.bias, activation)  # type: ignore[arg-type]
    return ACTIVATION_OF[activation](module(x))


def _dropped(module: nn.Module, x: Tensor) -> Tensor:
    return x if unheard(module, nn.Dropout) and not module.training else module(x)


def _feed_forward(layer, x: Tensor) -> Tensor:
    """The two linear layers, with the activation in the first one's product where that knows it."""
    known = activation_name(layer.activation)
    x = _linear(layer.linear1, x, known)
    x = x if known else layer.activation(x)
    return _linear(layer.linear2, _dropped(layer.dropout, x))


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    r"""`torch.nn.TransformerEncoderLayer` on the kernels of this package: constructor, parameters, shapes and results
    are torch's, in training and in eval mode, nested tensors included.

    .. math:: y = \mathrm{norm}_1(x + \mathrm{attention}(x)) \qquad
        z = \mathrm{norm}_2(y + W_2\, a(W_1 y + b_1) + b_2)

    With ``norm_first`` each norm stands before its block: :math:`y = x + \mathrm{attention}(\mathrm{norm}_1(x))`, …

    Args:
        d_model: E. nhead: heads, which divide E. dim_feedforward: rows of W_1.
        activation: a, ``"relu"``, ``"gelu"`` or a function of a tensor.
        dropout, layer_norm_eps, batch_first, norm_first, bias, device, dtype: as in torch.nn.TransformerEncoderLayer.

    Shapes: src [S, B, E] ([B, S, E] with ``batch_first``, [S, E] for one sequence) -> the same; masks and errors as in
    `MultiheadAttention`. Source: Vaswani et al. 2017, arXiv:1706.03762; norm_first: Xiong et al. 2020,
    arXiv:2002.04745.

    >>> layer = TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> layer(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    in_one_call = (
        True  #: whether this very class's step and forward are `_step`'s and `_whole`'s; no subclass's are
    )

    @wraps(nn.TransformerEncoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    @leaf_of_fx
    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        whole = in_few_calls(self, src, Hidden(src_mask, src_key_padding_mask, is_causal))
        if whole is not None:
            return whole

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal)

        return _residual(self, src, (self.norm1, attend), (self.norm2, self._ff_block))

    def _ff_block(self, x: Tensor) -> Tensor:
        return _dropped(self.dropout2, _feed_forward(self, x))

    def _why_no_step(self) -> str:
        return _why_no_step(self, TransformerEncoderLayer, {"self_attn": self.self_attn})

    def step(self, x: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
        """The layer of new positions x [B, n, E], as `TransformerEncoder.step` calls it."""
        own: MultiheadAttention = self.self_attn  # type: ignore[assignment]
        return _residual(
            self,
            x,
            (self.norm1, lambda x: _dropped(self.dropout1, own.attend_own(x, cache, layer, mask))),
            (self.norm2, self._ff_block),
        )


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    r"""`torch.nn.TransformerDecoderLayer` on the kernels of this package: constructor, parameters, shapes and results
    are torch's.

    .. math:: x_1 = \mathrm{norm}_1(x + \mathrm{attention}(x)) \qquad
        x_2 = \mathrm{norm}_2(x_1 + \mathrm{attention}(x_1, \mathrm{memory})) \qquad
        x_3 = \mathrm{norm}_3(x_2 + W_2\, a(W_1 x_2 + b_1) + b_2)

    Args: as `TransformerEncoderLayer`.

    Shapes: tgt [T, B, E] and memory [S, B, E] ([B, T, E], … with ``batch_first``, [T, E], … for one sequence) -> as
    tgt; masks and errors as in `MultiheadAttention`. Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> layer = TransformerDecoderLayer(8, 2, 16, batch_first=True)
    >>> layer(torch.randn(3, 5, 8), torch.randn(3, 7, 8)).shape
    torch.Size([3, 5, 8])
    """

    in_one_call = (
        True  #: whether this very class's step and forward are `_step`'s and `_whole`'s; no subclass's are
    )

    @wraps(nn.TransformerDecoderLayer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        _adopt(self)

    @leaf_of_fx
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        hidden = Hidden(tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        of_memory = Hidden(memory_mask, memory_key_padding_mask, memory_is_causal)
        whole = in_few_calls(self, tgt, hidden, Memory(memory, of_memory))
        if whole is not None:
            return whole
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )

    def _ff_block(self, x: Tensor) -> Tensor:
        return _dropped(self.dropout3, _feed_forward(self, x))

    def _why_no_step(self) -> str:
        parts = {"self_attn": self.self_attn, "multihead_attn": self.multihead_attn}
        return _why_no_step(self, TransformerDecoderLayer, parts)

    def step(self, x: Tensor, cache: KVCache, layer: int, mask: Tensor | None) -> Tensor:
        """The layer of new positions x [B, n, E], as `TransformerDecoder.step` calls it."""
        own: MultiheadAttention = self.self_attn  # type: ignore[assignment]
        cross: MultiheadAttention = self.multihead_attn  # type: ignore[assignment]
        return _residual(
            self,
            x,
            (self.norm1, lambda x: _dropped(self.dropout1, own.attend_own(x, cache, layer, mask))),
            (self.norm2, lambda x: _dropped(self.dropout2, cross.attend_memory(x, cache, layer))),
            (self.norm3, self._ff_block),
        )


def _why_no_step(layer: nn.Module, known: type[nn.Module], attentions: Mapping[str, nn.Module]) -> str:
    """Why a layer's `step` would not compute what its forward computes; empty if it does."""
    for name in ("forward", "_sa_block", "_mha_block"):
        own = has_own_forward(layer) if name == "forward" else name in vars(layer)
        if own or getattr(type(layer), name, None) is not getattr(known, name, None):
            return f"has its own {name}"
    for name, part in attentions.items():
        if not isinstance(part, MultiheadAttention):
            return f"has a {name} that is no seqkern.nn.MultiheadAttention"
        if reason := part._why_no_step():
            return f"has a {name} that {reason}"
    return ""


class TransformerEncoder(nn.TransformerEncoder):
    r"""`torch.nn.TransformerEncoder`: a stack of layers, and, beyond torch, one that generates with a causal cache.

    Where torch packs padded sequences into a nested tensor (eval mode, no gradients, src_key_padding_mask alone) so
    does this one, and padded rows of the output are the same; transforms of torch.func, where torch raises, do not.
    Masks go to the layers as they are given.

    Args: encoder_layer, num_layers, norm, enable_nested_tensor, mask_check: as in torch.nn.TransformerEncoder. The
        layer may be of any class; `step` and `generate` need `TransformerEncoderLayer`.

    Shapes: as `TransformerEncoderLayer`. Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 16, batch_first=True), num_layers=2)
    >>> encoder(torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    @leaf_of_fx
    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        may_pack = (
            mask is None and src_key_padding_mask is not None and getattr(self, "use_nested_tensor", False)
        )
        if may_pack and not self.layers[0].training and not _surroundings.in_transform():
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        causal = _masks.told_causal(mask, is_causal, src, self.layers)
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return output if self.norm is None else self.norm(output)

    def _is_itself(self) -> bool:
        return type(self).forward is TransformerEncoder.forward and not has_own_forward(self)

    def step(self, src: Tensor, cache: KVCache, *, src_key_padding_mask: Tensor | None = None) -> Tensor:
        """The next positions of sequences whose earlier ones are in the cache, each seeing itself and those before.

        Equal to the last rows of ``self(all positions, causal mask, is_causal=True)``. Runs without gradients and in
        eval mode; no forward is called, so hooks of layers and attention modules do not run.

        Args:
            src: [n, B, E] ([B, n, E] with batch_first, [n, E] for one sequence), any n.
            cache: a `KVCache`, which gets the positions.
            src_key_padding_mask: bool [B, n], True at positions to hide; [n] for one sequence.

        Returns:
            As src.

        Raises:
            RuntimeError: the stack is in training mode, or the positions exceed the cache's max_length.
            ValueError: sizes or a cache that do not belong together.
            TypeError: layers that cannot be stepped.

        >>> encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval()
        >>> src, cache = torch.randn(5, 3, 8), KVCache()
        >>> parts = [encoder.step(src[:3], cache), encoder.step(src[3:], cache)]
        >>> mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        >>> torch.allclose(torch.cat(parts), encoder(src, mask), atol=1e-5)
        True
        """
        return advance(self, src, cache, src_key_padding_mask)

    def generate(
        self,
        prompt: Tensor,
        *,
        embed: Callable[[Tensor, Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        max_new_tokens: int,
        lengths: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | list[int] | None = None,
        pad: int = 0,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Continues prompts as a decoder-only language model does: the stack with a causal mask.

        Arguments, results and errors as in `TransformerDecoder.generate`, without a memory.

        >>> table, places = torch.nn.Embedding(11, 8), torch.nn.Embedding(50, 8)
        >>> encoder = TransformerEncoder(TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval()
        >>> prompt = torch.tensor([[1, 2, 3], [4, 5, 0]])
        >>> encoder.generate(
        ...     prompt,
        ...     lengths=torch.tensor([3, 2]),
        ...     embed=lambda tokens, positions: table(tokens) + places(positions),
        ...     logits=lambda x: x @ table.weight.T,
        ...     max_new_tokens=4,
        ... ).lengths
        tensor([7, 6])
        """
        return generate(
            self,
            prompt,
            embed,
            logits,
            max_new_tokens,
            lengths,
            temperature,
            top_k,
            top_p,
            eos,
            pad,
            generator,
        )


class TransformerDecoder(nn.TransformerDecoder):
    r"""`torch.nn.TransformerDecoder`: a stack of layers, and, beyond torch, one that generates with a cache.

    Args: decoder_layer, num_layers, norm: as in torch.nn.TransformerDecoder. The layer may be of any class; `step` and
        `generate` need `TransformerDecoderLayer`.

    Shapes: as `TransformerDecoderLayer`. Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> decoder = TransformerDecoder(TransformerDecoderLayer(8, 2, 16, batch_first=True), num_layers=2)
    >>> decoder(torch.randn(3, 5, 8), torch.randn(3, 7, 8)).shape
    torch.Size([3, 5, 8])
    """

    @leaf_of_fx
    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        causal = _masks.told_causal(tgt_mask, tgt_is_causal, tgt, self.layers)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return super().forward(tgt, memory, *masks, causal, memory_is_causal)

    def _is_itself(self) -> bool:
        return type(self).forward is TransformerDecoder.forward and not has_own_forward(self)

    def step(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        cache: KVCache,
        *,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The next positions of targets whose earlier ones are in the cache, each seeing itself and those before.

        Equal to the last rows of ``self(all positions, memory, causal mask)``. The memory's keys and values are
        computed in the first call with a cache. Runs without gradients and in eval mode; no forward is called, so
        hooks of layers and attention modules do not run.

        Args:
            tgt: [n, B, E] ([B, n, E] with batch_first, [n, E] for one sequence), any n.
            memory: [S, B, E] ([B, S, E], [S, E]); in later calls the same tensor, or None.
            cache: a `KVCache`, which gets the positions.
            tgt_key_padding_mask: bool [B, n], True at positions to hide; [n] for one sequence.
            memory_key_padding_mask: [B, S] or [S], bool or float, read in the first call.

        Returns:
            As tgt.

        Raises:
            RuntimeError: the stack is in training mode, or the positions exceed the cache's max_length.
            ValueError: sizes or a cache that do not belong together.
            TypeError: layers that cannot be stepped.

        >>> decoder = TransformerDecoder(TransformerDecoderLayer(8, 2, 16), 2).eval()
        >>> tgt, memory, cache = torch.randn(5, 3, 8), torch.randn(7, 3, 8), KVCache()
        >>> parts = [decoder.step(tgt[:3], memory, cache), decoder.step(tgt[3:], None, cache)]
        >>> mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        >>> torch.allclose(torch.cat(parts), decoder(tgt, memory, mask), atol=1e-5)
        True
        """
        return advance(self, tgt, cache, tgt_key_padding_mask, memory, memory_key_padding_mask)

    def generate(
        self,
        prompt: Tensor,
        memory: Tensor,
        *,
        embed: Callable[[Tensor, Tensor], Tensor],
        logits: Callable[[Tensor], Tensor],
        max_new_tokens: int,
        lengths: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | list[int] | None = None,
        pad: int = 0,
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Continues prompts token by token, each position computed once.

        Args:
            prompt: int64 [B, P], or [P] for one sequence; at least one token each, such as the start token.
            memory: [S, B, E] ([B, S, E] with batch_first, [S, E] for one sequence).
            embed: gives the decoder's input [B, n, E] for tokens [B, n] and their positions [B, n], counted from 0
                without padding; batch first, whatever the decoder's layout is.
            logits: gives scores [B, V] for the decoder's output [B, E]. On a CPU neither may change the layers, which
                are looked at once for all tokens.
            max_new_tokens: the most tokens to add.
            lengths: int64 [B], how many tokens of each prompt count, where they are padded on the right.
            memory_key_padding_mask: [B, S] or [S], as in `forward`.
            temperature: divides the scores before a token is drawn; 0 takes the best one (greedy).
            top_k: draw among the k best only.
            top_p: draw among the best whose probabilities first reach p together.
            eos: a token, or several, that end a sequence; it ends with the token. All ended, generation does.
            pad: stands behind shorter sequences in the result.
            generator: makes the draws reproducible; torch's own if None.

        Returns:
            `Generated`: tokens, int64 [B, T], prompt and continuation in one piece, and lengths, int64 [B].

        Raises:
            ValueError: sizes, lengths or options out of range.
            RuntimeError: the decoder is in training mode, where dropout would act.
            TypeError: layers that cannot be stepped.

        Source: nucleus sampling (top_p): Holtzman et al. 2020, arXiv:1904.09751.

        >>> table, places = torch.nn.Embedding(11, 8), torch.nn.Embedding(50, 8)
        >>> decoder = TransformerDecoder(TransformerDecoderLayer(8, 2, 16, batch_first=True), 2).eval()
        >>> found = decoder.generate(
        ...     torch.full((3, 1), 1),
        ...     torch.randn(3, 7, 8),
        ...     embed=lambda tokens, positions: table(tokens) + places(positions),
        ...     logits=lambda x: x @ table.weight.T,
        ...     max_new_tokens=4,
        ... )
        >>> found.tokens.shape, found.lengths
        (torch.Size([3, 5]), tensor([5, 5, 5]))
        """
        return generate(
            self,
            prompt,
            embed,
            logits,
            max_new_tokens,
            lengths,
            temperature,
            top_k,
            top_p,
            eos,
            pad,
            generator,
            memory,
            memory_key_padding_mask,
        )


class Transformer(nn.Transformer):
    r"""`torch.nn.Transformer` on the kernels of this package: constructor, parameters, shapes and results are torch's.

    Args: as in torch.nn.Transformer. A custom encoder or decoder stays of the class that it has.

    Shapes: src [S, B, E], tgt [T, B, E] ([B, S, E], … with ``batch_first``, [S, E], … for one sequence) -> as tgt;
    masks and errors as in `MultiheadAttention`. Source: Vaswani et al. 2017, arXiv:1706.03762.

    >>> transformer = Transformer(8, 2, 1, 1, 16, batch_first=True).eval()
    >>> transformer(torch.randn(3, 7, 8), torch.randn(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    @wraps(nn.Transformer.__init__)
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        given = signature(nn.Transformer.__init__).bind(self, *args, **kwargs).arguments
        for name in ("encoder", "decoder"):
            if given.get(f"custom_{name}") is None:
                _adopt(getattr(self, name))

    forward = leaf_of_fx(nn.Transformer.forward)


_PARTS = (TransformerEncoderLayer, TransformerDecoderLayer, TransformerEncoder, TransformerDecoder)
