"""The masks of `seqkern.integrations.transformers`: as little as what a model asks for can be said with.

transformers describes a mask by a function of positions, a padding mask and offsets into a cache. A causal or windowed
one becomes options of the attention itself; anything else becomes the tensor that transformers makes for torch.
"""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Band(NamedTuple):
    """The keys that a query sees around its own place: so many before and after it, None for no limit."""

    left: int | None = None
    right: int | None = None


class BandMask(Tensor):
    """A mask [B, 1, L, S] of bool (True = attend) that is a band and a padding, and is not written out.

    The last query stands at key ``keys - 1``; later keys, the unused end of a static cache, are seen by none. To
    everything but the attention function here it is the mask itself: torch's operators read, slice or change a tensor
    that is written for the first of them, and stays what this mask means.
    """

    band: Band
    keys: int
    padding: Tensor | None  # [B, keys], True = a token
    written: Tensor | None

    @staticmethod
    def __new__(cls, band: Band, padding: Tensor | None, keys: int, shape: tuple[int, ...], device):
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)  # type: ignore[attr-defined]
        self.band, self.keys, self.padding, self.written = band, keys, padding, None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, cls.write, (args, kwargs or {}))
        return func(*args, **kwargs)

    def write(self) -> Tensor:
        """The mask as a plain tensor, always the same one."""
        if self.written is None:
            B, _, L, S = self.shape
            at = torch.arange(S, device=self.device)
            distance = at - (torch.arange(L, device=self.device) + (self.keys - L))[:, None]
            seen = (at < self.keys).expand(L, S)
            left, right = self.band
            if left is not None:
                seen = seen & (distance >= -left)
            if right is not None:
                seen = seen & (distance <= right)
            seen = seen.expand(B, 1, L, S)
            if self.padding is not None:
                padding = torch.nn.functional.pad(self.padding, (0, S - self.keys))
                seen = seen & padding[:, None, None]
            self.written = seen.contiguous()
        return self.written

    def __deepcopy__(self, memo) -> Tensor:
        return self.write().clone()

    def __reduce_ex__(self, protocol):
        return self.write().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        padded = "" if self.padding is None else ", padded"
        return f"BandMask({list(self.shape)}, {self.band}, keys={self.keys}{padded})"


def _code(function) -> object:
    return getattr(function, "__code__", None)


def _cell(function, name: str):
    return inspect.getclosurevars(function).nonlocals[name]


def band_of(mask_function, masking) -> Band | None:
    """The band that a mask function of transformers describes; None if it is something else."""
    if mask_function is masking.causal_mask_function:
        return Band(None, 0)
    if mask_function is masking.bidirectional_mask_function:
        return Band()
    if _code(mask_function) is _code(masking.sliding_window_overlay(1)):  # k > q - n
        return Band(_cell(mask_function, "sliding_window") - 1, None)
    if _code(mask_function) is _code(masking.sliding_window_bidirectional_overlay(1)):  # |q - k| <= n
        return Band(*2 * (_cell(mask_function, "sliding_window"),))
    if _code(mask_function) is not _code(masking.and_masks()):
        return None
    sides = ([], [])
    for part in _cell(mask_function, "mask_functions"):
        band = band_of(part, masking)
        if band is None:
            return None
        for found, side in zip(sides, band):
            found += [] if side is None else [side]
    return Band(*(min(found, default=None) for found in sides))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> Tensor | None:
    """transformers' interface of mask functions. None, a padding expanded to [B, 1, L, S], a `BandMask`, or any mask
    [B, 1, L, S] of bool.

    Raises:
        ValueError: a model that computes its attention itself would read the mask, as numbers to add.
    """
    from transformers import masking_utils as masking
    from transformers.utils.import_utils import is_tracing

    _refuse_models_of_their_own(config)
    mask_function = masking.causal_mask_function if mask_function is None else mask_function

    def written_out() -> Tensor | None:
        return masking.sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,  # type: ignore[arg-type]
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=tracing and allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    tracing = is_tracing(attention_mask) or is_tracing(q_offset)
    may_be_none = allow_is_causal_skip or allow_is_bidirectional_skip
    band = None if tracing or use_vmap else band_of(mask_function, masking)
    # A cache that GPUs decode from in a compiled graph, which takes plain tensors.
    compiled = q_length == 1 and not allow_is_causal_skip and torch.device(device).type != "cpu"
    if band is None or compiled:
        return written_out()
    place = int(q_offset) - kv_offset  # of the first query, among the keys that there are
    if band.right == 0:
        keys = min(place + q_length, kv_length)
    else:
        keys = kv_length
    if band != Band() and keys != place + q_length:
        return written_out()
    padding = None
    if attention_mask is not None:
        padding = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        padding = padding[:, kv_offset : kv_offset + keys].to(torch.bool)
        padding = None if bool(padding.all()) else padding
    band = Band(
        None if band.left is None or band.left >= keys - 1 else band.left,
        None if band.right is None or band.right >= keys - 1 - place else band.right,
    )
    if band == Band() and keys == kv_length and padding is not None:
        return padding[:, None, None].expand(-1, 1, q_length, -1)
    # None is "every key" to a model's own code; what is causal is never said by it.
    if band == Band() and keys == kv_length and padding is None and may_be_none:
        return None
    return BandMask(band, padding, keys, (batch_size, 1, q_length, kv_length), device)


_HALF = ("bigbird_pegasus",)  # encoders with attention of their own beside decoders without
_known: dict[type, bool] = {}  # by the class of a configuration


def _refuse_models_of_their_own(config) -> None:
    """Whether a model's own code computes its attention can be told from its source alone, as transformers does."""
    if config is not None and not _use_the_interface(type(config)):
        raise ValueError(
            f"attn_implementation is 'seqkern', but the code of transformers for {config.model_type!r} computes its "
            "attention itself and would ignore it; load the model with attn_implementation='eager' (or 'sdpa' where it "
            "has that, which seqkern.enable() serves)"
        )


def _use_the_interface(kind: type) -> bool:
    if kind not in _known:
        named, beside = _models_of(kind)
        can: Any = [model._can_set_attn_implementation() for model in named or beside]  # type: ignore[attr-defined]
        # Of models that name one configuration, one may go on from another's results, as ESM's that folds.
        by_it = any(can) if named else all(can)
        _known[kind] = (by_it or not can) and getattr(kind, "model_type", "") not in _HALF
    return _known[kind]


_use_the_interface._dynamo_marked_constant = True  # type: ignore[attr-defined]  # reads sources


def _models_of(kind: type) -> tuple[list[type], list[type]]:
    """The model classes, of those that are loaded, that a configuration may be of: those that name it, and all that
    were written beside it. A model that is running is loaded."""
    from transformers import PreTrainedModel

    def below(cls: type) -> Iterator[type]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    published = [
        m
        for m in below(PreTrainedModel)
        if m.__module__.startswith(("transformers.", "transformers_modules."))
    ]
    room = kind.__module__.rpartition(".")[0] + "."
    of_a_model = room.startswith(("transformers.models.", "transformers_modules."))
    beside = [m for m in published if of_a_model and m.__module__.startswith(room)]
    return [m for m in published if m.config_class is kind], beside
