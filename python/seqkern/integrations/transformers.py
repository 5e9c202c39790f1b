"""``attn_implementation="seqkern"`` for the models of Hugging Face transformers.

>>> from seqkern.integrations import transformers
>>> transformers.register()  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="seqkern")  # doctest: +SKIP

Every model that takes its attention from transformers' ``AttentionInterface`` can have it: BERT, GPT-2, Llama, Mistral,
Gemma, GPT-OSS, T5, ViT, Whisper and most others. A model that computes its attention in code of its own (BLOOM, Falcon,
MPT, GPT-Neo, ...) would ignore the name: the mask function raises there.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from seqkern import functional
from seqkern.integrations._transformers_masks import SeenMask, make_mask
from seqkern.ops import _surroundings

NAME = "seqkern"
# What sparse attention is told by, and sinks of each token: ignored, they would be wrong numbers.
_NOT_SERVED = ("indices", "block_indices", "sinks")
_collector: Any = None  # transformers' own, once `register` was called


def register() -> None:
    """Makes the attention and the mask function known to transformers as "seqkern". A second call changes nothing.

    Raises:
        ImportError: transformers is not installed, or its mask functions are told another way (before 5.23).

    >>> register()  # doctest: +SKIP
    >>> from transformers import BertConfig, BertModel  # doctest: +SKIP
    >>> model = BertModel._from_config(BertConfig(), attn_implementation="seqkern")  # doctest: +SKIP
    """
    global _collector
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
        from transformers.utils.output_capturing import _active_collector
    except ImportError as e:
        raise ImportError(
            f"seqkern.integrations.transformers needs Hugging Face transformers ({e}); pip install 'transformers>=5.23'"
        ) from e
    if "q_offset" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError(
            "this transformers tells its mask functions no q_offset, which seqkern's needs; "
            "pip install 'transformers>=5.23'"
        )
    _collector = _active_collector
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, make_mask)


def _filled(mask: Tensor, keys: int) -> int:
    """The keys up to the last that a mask of bool shows: most of a static cache is empty. Not asked where a graph is
    made, nor of a GPU, which would be waited for."""
    if mask.shape[-1] != keys or not mask.is_cpu or _surroundings.is_looked_on():
        return keys
    shown = mask.reshape(-1, keys).any(0).nonzero()
    return int(shown[-1]) + 1 if len(shown) else keys


def _narrow(mask: Tensor) -> Tensor:
    """What a mask says, without the copies that an expansion made of it."""
    for at in range(mask.dim() - 1):
        if mask.shape[at] > 1 and mask.stride(at) == 0:
            mask = mask.narrow(at, 0, 1)
    return mask


def _are_collected() -> bool:
    """Whether a model's hooks collect attention weights, of which the attention is told nothing."""
    if _collector is None or (torch.compiler.is_compiling() and not _collector.compiling):
        return False  # else Dynamo would have to read a context variable, which it cannot
    found = _collector.get()
    return found is not None and any(name.endswith("attentions") for name in found)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    position_bias: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    r"""transformers' interface of attention functions, by `seqkern.functional.attention`.

    .. math:: o = \mathrm{softmax}(\mathrm{cap}(\mathrm{scaling}\; q k^\top) + b + m)\, v

    Args:
        query: [B, Hq, L, D]. key, value: [B, Hkv, S, D] and [B, Hkv, S, Dv], heads not repeated.
        attention_mask: bool (True = attend) or added to the scores, broadcast to [B, Hq, L, S]. Where it is given it
            says all. None: every key, as to a model's own code (``make_mask`` says causal by a mask, whatever the
            module's ``is_causal``), unless the caller says otherwise.
        is_causal, sliding_window: without a mask alone, the window only of a causal call, both from the last key on.
        softcap: of the scores. s_aux: sinks, [Hq]. position_bias: added to the scores, [1 or B, Hq, L, S].
        output_attentions: whether the weights [B, Hq, L, S] are returned; also where a model collects what its
            layers return, but not from a layer that is compiled alone.

    Returns:
        ([B, L, Hq, Dv], weights or None).

    Raises:
        ValueError: sparse attention (``indices``, ``block_indices``) or sinks of each token (``sinks``).

    Source: the interface is documented in transformers' guide on attention functions.

    >>> q, k = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    >>> output, _ = attention(torch.nn.Identity(), q, k, k, None)
    >>> output.shape
    torch.Size([1, 3, 4, 8])
    """
    for name in _NOT_SERVED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"seqkern's attention was given {name!r} by {type(module).__name__}, which it does not serve; "
                "load the model with attn_implementation='eager'"
            )
    B, L, S = max(query.shape[0], key.shape[0]), query.shape[2], key.shape[2]
    query, key, value = (
        x if x.shape[0] == B else x.expand(B, *x.shape[1:]) for x in (query, key, value)
    )  # learned queries have a batch of one
    mask, bias, causal, window = None, position_bias, False, None
    keys = S
    told = attention_mask if isinstance(attention_mask, SeenMask) and attention_mask.written is None else None
    if told is not None and told.seen is not None:
        mask = _narrow(told.seen)
    elif told is not None and told.shape[3] == S:
        keys, (left, right) = told.keys, told.band
        window = None if left is None and right is None else (left, right)
        if told.padding is not None:
            mask = told.padding[:, None, None]
    elif attention_mask is not None:
        given = attention_mask.write() if isinstance(attention_mask, SeenMask) else attention_mask
        if given.dtype == torch.bool:
            keys = _filled(given, S) if L == 1 else S
            mask = _narrow(given)
        else:
            bias = _narrow(given) if bias is None else bias + given
    elif L > 1 and is_causal:
        causal = "bottom-right"
        window = None if sliding_window is None else (sliding_window - 1, None)
    if keys != S:
        key, value = key[:, :, :keys], value[:, :, :keys]
        mask = mask if mask is None or mask.shape[-1] == 1 else mask[..., :keys]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., :keys]
    found = functional.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
        scale=scaling,
        return_weights="heads" if output_attentions or _are_collected() else False,
    )
    output, weights = found if isinstance(found, tuple) else (found, None)
    assert isinstance(output, Tensor)
    if weights is not None and keys != S:
        weights = torch.nn.functional.pad(weights, (0, S - keys))
    return output.transpose(1, 2).contiguous(), weights
