"""KVCache: the keys and values that incremental decoding need not compute again."""

import copy
import operator
from contextlib import AbstractContextManager, nullcontext
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from seqkern.nn._masks import Seen

SMALLEST = 16
TO_COME = "a stack to come"


def _widens(held: torch.dtype, new: torch.dtype) -> bool:
    """Whether what autocast made narrower is held without loss; attention makes it narrow again."""
    return torch._C._is_any_autocast_enabled() and torch.promote_types(held, new) is held  # type: ignore[attr-defined]


def _kept() -> AbstractContextManager:
    """Where storage is made: what is made in inference mode could not be written to outside of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class KVCache:
    """Keys and values of the positions that a stack of layers has seen, and of the memory it attends to.

    `TransformerDecoder.step` and `TransformerEncoder.step` fill and read it. Storage doubles when it is full, so that a
    sequence of n positions costs O(n) copying in all, and never exceeds ``max_length``. The sequences of a batch may
    be of unequal length: a padded position is kept, hidden from every query. One cache serves one batch in one stack,
    from its first call until `clear`.

    Args:
        max_length: the most positions it may hold, None for no limit.
        capacity: positions to make room for at first; nothing is copied until they are used up.

    Raises:
        ValueError: a negative number, or a capacity above max_length.

    >>> import torch, seqkern.nn as nn
    >>> decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, batch_first=True), 2).eval()
    >>> memory, cache = torch.randn(3, 7, 8), nn.KVCache(max_length=100)
    >>> decoder.step(torch.randn(3, 4, 8), memory, cache).shape, cache.length
    (torch.Size([3, 4, 8]), 4)
    >>> decoder.step(torch.randn(3, 1, 8), memory, cache).shape, cache.length
    (torch.Size([3, 1, 8]), 5)
    """

    def __init__(self, max_length: int | None = None, *, capacity: int = 0) -> None:
        for name, value in (("max_length", max_length), ("capacity", capacity)):
            if not isinstance(value, int | NoneType):
                raise TypeError(f"KVCache: {name} is {value!r}, expected a whole number of positions")
            if value is not None and value < 0:
                raise ValueError(
                    f"KVCache: {name} is {value}, expected a number of positions that is not negative"
                )
        if capacity is None:
            raise TypeError(
                "KVCache: capacity is None, expected a whole number of positions; 0 makes room when needed"
            )
        if max_length is not None and capacity > max_length:
            raise ValueError(f"KVCache: capacity is {capacity}, expected at most max_length = {max_length}")
        self.max_length = max_length
        self._first_capacity = capacity
        self.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KVCache":
        """A copy of the cache alone serves the same stack and memory; copied along with the stack, the copy of it."""
        fields, kept = dict(vars(self)), {}
        if not memo:
            kept = {name: fields.pop(name) for name in ("owner", "memory")}
        found = memo[id(self)] = object.__new__(KVCache)
        vars(found).update(copy.deepcopy(fields, memo) | kept)
        return found

    def __copy__(self) -> "KVCache":
        """Storage of its own: positions that one of them gets would be written over by the other's."""
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        """Without the stack, which is saved apart: a loaded cache belongs to the one that takes the next step on it."""
        return vars(self) | {"owner": None if self.owner is None else TO_COME}

    def clear(self) -> None:
        """Forgets everything, the memory too."""
        self._length = 0  #: positions that count; what lies behind them is to be written over
        self._capacity = self._first_capacity
        self._own: list[Tensor] = []  #: for each layer [B, 2, H, capacity, D], keys and values
        self._memory: list[tuple[Tensor, Tensor]] = []  #: for each layer keys and values [B, H, S, D]
        self._real: Tensor | None = None  #: [B, capacity], False at padding; None while there is none
        self.memory: Tensor | None = None  #: the memory whose keys and values are held
        self.memory_seen = Seen()  #: what of the memory is seen
        self.owner: object = None  #: the stack that fills it; `TO_COME` of a loaded cache

    @property
    def length(self) -> int:
        """How many positions are held, padding included."""
        return self._length

    @property
    def capacity(self) -> int:
        """How many positions there is room for before storage grows."""
        return self._capacity

    @property
    def batch(self) -> int | None:
        """How many sequences it holds; None before the first call."""
        held = self._own or [keys for keys, _ in self._memory]
        return held[0].shape[0] if held else None

    @property
    def layers(self) -> int:
        """Of how many layers it holds positions, or the memory alone; 0 before the first call."""
        return len(self._own) if self._length else len(self._memory)

    @property
    def lengths(self) -> Tensor | None:
        """[B], how many positions of each sequence are no padding; None before the first call."""
        if self._real is not None:
            return self._real[:, : self._length].sum(1)
        held = self._own[0] if self._own else None
        return held if held is None else held.new_full(held.shape[:1], self._length, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of storage, room not yet used included."""
        pairs = (x for pair in self._memory for x in pair)
        return sum(x.numel() * x.element_size() for x in (*self._own, *pairs))

    def truncate(self, length: int) -> None:
        """Forgets the positions from ``length`` on, such as drafts that were not accepted."""
        try:
            length = operator.index(length)
        except TypeError:
            raise TypeError(
                f"KVCache: length is {length!r}, expected a whole number of positions to keep"
            ) from None
        if not 0 <= length <= self._length:
            raise ValueError(f"KVCache: truncate to {length}, expected between 0 and the {self._length} held")
        self._length = length

    def select(self, sequences: Tensor) -> None:
        """Makes sequence ``sequences[i]`` the i-th, for each i: the order of a beam search, or a smaller batch.

        Args:
            sequences: int64 [any number], indices into the batch.
        """
        if not isinstance(sequences, Tensor):
            raise TypeError(
                f"KVCache: sequences is a {type(sequences).__name__}, expected a tensor of torch.int64 indices [n]"
            )
        if sequences.dim() != 1 or sequences.dtype != torch.int64:
            raise ValueError(
                f"KVCache: sequences is {sequences.dtype} {list(sequences.shape)}, expected torch.int64 indices [n]"
            )
        held = self._own[0] if self._own else None
        if held is not None and held.is_cpu and sequences.numel():
            least, most = (int(each) for each in sequences.aminmax())
            if least < 0 or most >= held.shape[0]:
                raise IndexError(
                    f"KVCache: sequences holds {least if least < 0 else most}, expected indices of the "
                    f"{held.shape[0]} sequences held, from 0"
                )
        with _kept():
            self._own = [x.index_select(0, sequences) for x in self._own]
            self._real = self._real if self._real is None else self._real.index_select(0, sequences)
        self._memory = [(k.index_select(0, sequences), v.index_select(0, sequences)) for k, v in self._memory]
        mask, bias, _ = self.memory_seen
        mask, bias = (x if x is None else x.index_select(0, sequences) for x in (mask, bias))
        self.memory_seen = Seen(mask, bias)

    def open(self, count: int, padding: Tensor | None) -> Tensor | None:
        """Makes room for ``count`` more positions; they count once `close` is called.

        Args:
            padding: bool [B, count], True at positions to hide.

        Returns:
            bool [B, 1, 1, length + count], the positions that may be seen; None for all of them.

        Raises:
            RuntimeError: more positions than max_length.
        """
        length, wanted = self._length, self._length + count
        if length == 0:
            self._own, self._real = [], None  # what a first call that failed has left
        if self.max_length is not None and wanted > self.max_length:
            raise RuntimeError(
                f"KVCache: {count} more positions behind the {length} held exceed max_length = {self.max_length}; "
                "make the cache with a larger one, or truncate or clear it"
            )
        if wanted > self._capacity:
            self._grow(wanted)
        if padding is not None and self._real is None and padding.any():
            with _kept():
                self._real = padding.new_ones(padding.shape[0], self._capacity)
        if self._real is None:
            return None
        self._real[:, length:wanted] = True if padding is None else ~padding
        return self._real[:, None, None, :wanted]

    def storage(self, layer: int, like: Tensor, heads: int, size: int) -> Tensor:
        """[B, 2, H, capacity, D], a layer's keys and values for as many sequences as ``like`` has; made when new."""
        if layer == len(self._own):
            with _kept():
                self._own.append(like.new_empty(like.shape[0], 2, heads, self._capacity, size))
        held = self._own[layer]
        if held.dtype is not like.dtype and not _widens(held.dtype, like.dtype):
            raise RuntimeError(
                f"KVCache: it holds {held.dtype}, and the new keys and values are {like.dtype}; make all steps of a "
                "cache under one autocast and with parameters of one dtype"
            )
        return held

    def write(self, layer: int, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, 2, H, n, D] of a layer's new positions -> those of all positions, [B, H, S, D] each."""
        length, wanted = self._length, self._length + pair.shape[3]
        held = self.storage(layer, pair, pair.shape[2], pair.shape[4]).narrow(3, 0, wanted)
        held.narrow(3, length, pair.shape[3]).copy_(pair)
        return held.unbind(1)  # type: ignore[return-value]

    def close(self, count: int) -> None:
        self._length += count

    def remember(self, memory: Tensor, pairs: list[Tensor], seen: Seen) -> None:
        """Holds each layer's keys and values [B, 2, H, S, D] of a memory, and what of it is seen."""
        self._memory = [pair.contiguous().unbind(1) for pair in pairs]  # type: ignore[misc]
        self.memory, self.memory_seen = memory, seen

    def recall(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._memory[layer]

    def _grow(self, wanted: int) -> None:
        room = max(wanted, 2 * self._capacity, SMALLEST)
        room = room if self.max_length is None else min(room, self.max_length)
        length = self._length
        with _kept():
            for i, held in enumerate(self._own):
                larger = held.new_empty(*held.shape[:3], room, held.shape[4])
                larger.narrow(3, 0, length).copy_(held.narrow(3, 0, length))
                self._own[i] = larger
            if self._real is not None:
                self._real = torch.nn.functional.pad(self._real, (0, room - self._real.shape[1]), value=True)
        self._capacity = room
