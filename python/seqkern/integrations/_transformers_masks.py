"""The masks of `seqkern.integrations.transformers`: as little as what a model asks for can be said with.

transformers describes a mask by a function of positions, a padding mask and offsets into a cache. A causal or windowed
one becomes options of the attention itself; anything else becomes the tensor of bool that transformers makes for
torch. Either way the model's own code finds the mask that eager attention takes.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqkern.ops._surroundings import known_constant


class Band(NamedTuple):
    """The keys that a query sees around its own place: so many before and after it, None for no limit."""

    left: int | None = None
    right: int | None = None


class SeenMask(Tensor):
    """A mask [B, 1, L, S] that is added to scores, 0 or the least number of its dtype, as eager attention takes it, and
    that knows which keys are seen: by a band and a padding that are not written out, or by a tensor of bool.

    Of a band the last query stands at key ``keys - 1``; later keys, the unused end of a static cache, are seen by none.
    To everything but the attention function here it is the mask itself: torch's operators read, slice or change a
    tensor that is written for the first of them, and stays what this mask means. So a model that computes a part of its
    attention by code of its own gets what it would get with eager attention.
    """

    band: Band
    keys: int
    padding: Tensor | None  # [B, keys], True = a token
    seen: Tensor | None  # [B, 1, L, S], True = seen; then there is no band
    written: Tensor | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device,
        *,
        band: Band | None = None,
        padding: Tensor | None = None,
        keys: int | None = None,
        seen: Tensor | None = None,
    ):
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)  # type: ignore[attr-defined]
        self.band, self.padding = band or Band(), padding
        self.keys = shape[3] if keys is None else keys
        self.seen, self.written = seen, None
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = pytree.tree_map_only(cls, cls.write, (args, kwargs or {}))
        return func(*args, **kwargs)

    def write(self) -> Tensor:
        """The mask as a plain tensor, always the same one."""
        if self.written is None:
            zero = torch.zeros((), dtype=self.dtype, device=self.device)
            self.written = torch.where(self.shown(), zero, torch.finfo(self.dtype).min).contiguous()
        return self.written

    def shown(self) -> Tensor:
        """Which keys are seen, [B, 1, L, S] of bool, whatever was done to the mask."""
        if self.seen is not None:
            return self.seen
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
        return seen

    def __deepcopy__(self, memo) -> Tensor:
        return self.write().clone()

    def __reduce_ex__(self, protocol):
        return self.write().__reduce_ex__(protocol)

    def __repr__(self) -> str:  # type: ignore[override]
        if self.seen is not None:
            return f"SeenMask({list(self.shape)}, {self.dtype})"
        padded = "" if self.padding is None else ", padded"
        return f"SeenMask({list(self.shape)}, {self.dtype}, {self.band}, keys={self.keys}{padded})"


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
    dtype: torch.dtype = torch.float32,
    config=None,
    **kwargs,
) -> Tensor | None:
    """transformers' interface of mask functions: None where eager attention gets None, else a `SeenMask`; a plain
    tensor of bool, or of numbers to add, where a compiler takes no other.

    Raises:
        ValueError: all of the model's code computes its attention itself.
    """
    from transformers import masking_utils as masking
    from transformers.utils.import_utils import is_tracing

    _refuse_models_of_their_own(config)
    mask_function = masking.causal_mask_function if mask_function is None else mask_function
    shape = (batch_size, 1, q_length, kv_length)

    def written_out(make: Callable, **more) -> Tensor | None:
        return make(
            batch_size,
            q_length,
            kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            use_vmap=use_vmap,
            device=device,
            **more,
            **kwargs,
        )

    # A cache of one size, which is not to skip its mask, is for compiled graphs: they would be made anew for every
    # number of keys that a mask tells.
    compiled = q_length == 1 and not allow_is_causal_skip
    if is_tracing(attention_mask) or is_tracing(q_offset) or compiled:
        if config is not None and _take_bool(type(config)):
            return written_out(masking.sdpa_mask)
        return written_out(masking.eager_mask, dtype=dtype)

    def written() -> Tensor | None:
        seen = written_out(masking.sdpa_mask)
        return seen if seen is None else SeenMask(tuple(seen.shape), dtype, device, seen=seen)  # type: ignore

    band = None if use_vmap else band_of(mask_function, masking)
    if band is None:
        return written()
    place = int(q_offset) - kv_offset  # of the first query, among the keys that there are
    if band.right == 0:
        keys = min(place + q_length, kv_length)
    else:
        keys = kv_length
    if band != Band() and keys != place + q_length:
        return written()
    padding = None
    if attention_mask is not None:
        padding = masking.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        assert padding is not None
        padding = padding[:, kv_offset : kv_offset + keys].to(torch.bool)
        padding = None if bool(padding.all()) else padding
    if band == Band() and padding is None and allow_is_bidirectional_skip:
        return None
    band = Band(
        None if band.left is None or band.left >= keys - 1 else band.left,
        None if band.right is None or band.right >= keys - 1 - place else band.right,
    )
    return SeenMask(shape, dtype, device, band=band, padding=padding, keys=keys)  # type: ignore


def _refuse_models_of_their_own(config) -> None:
    """Whether a model's own code computes its attention can be told from its source alone, as transformers does."""
    if config is not None and not _use_the_interface(type(config)):
        raise ValueError(
            f"attn_implementation is 'seqkern', but the code of transformers for {config.model_type!r} computes its "
            "attention itself and would ignore it; load the model with attn_implementation='eager' (or 'sdpa' where it "
            "has that, which seqkern.enable() serves)"
        )


@known_constant
def _use_the_interface(kind: type) -> bool:
    """Whether the code of the models that name a configuration calls attention by name; reads sources."""
    named, beside = _models_of(kind)
    can: Any = [model._can_set_attn_implementation() for model in named or beside]  # type: ignore[attr-defined]
    # Of models that name one configuration, one may go on from another's results, as ESM's that folds.
    return any(can) if named else all(can)


@known_constant
def _take_bool(kind: type) -> bool:
    """Whether the code of all models that name a configuration hands its mask on, which may then be one of bool."""
    named = _models_of(kind, published=False)[0]
    return bool(named) and all(model._supports_sdpa for model in named)  # type: ignore[attr-defined]


def _models_of(kind: type, published: bool = True) -> tuple[list[type], list[type]]:
    """The model classes, of those that are loaded, that a configuration may be of: those that name it, and all that
    were written beside it. A model that is running is loaded."""
    from transformers import PreTrainedModel

    def below(cls: type) -> Iterator[type]:
        for each in cls.__subclasses__():
            yield each
            yield from below(each)

    rooms = ("transformers.", "transformers_modules.") if published else ""
    models = [m for m in below(PreTrainedModel) if m.__module__.startswith(rooms)]
    room = kind.__module__.rpartition(".")[0] + "."
    of_a_model = room.startswith(("transformers.models.", "transformers_modules."))
    beside = [m for m in models if of_a_model and m.__module__.startswith(room)]
    return [m for m in models if m.config_class is kind], beside
