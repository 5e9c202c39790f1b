"""Which calls of torch's operators this package takes, and which stay torch's.

What no kernel of this package serves, and a transform or a subclass of Tensor, goes on to torch's own kernel as if
nothing stood in its place, at once: there the choice itself is the cost.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from seqkern.ops import _backend, _surroundings
from seqkern.ops._attention_backends import Wanted
from seqkern.ops._backend import Call, Choice
from seqkern.spec.attention import Options, Tensors


class Worth(NamedTuple):
    """Any of these makes a recurrent call worth the way to our kernels (docs/decisions.md)."""

    steps: int  # of a layer
    numbers: int  # in the matrices of a step
    products: int  # of a step: those numbers times the batch


WORTH = {
    "lstm": Worth(1, 0, 0),
    "gru": Worth(3, 390_000, 1_500_000),
    "rnn_tanh": Worth(8, 1_000_000, 3_000_000),
    "rnn_relu": Worth(8, 1_000_000, 3_000_000),
    "lstm_cell": Worth(2, 390_000, 1_500_000),
    "gru_cell": Worth(2, 390_000, 1_500_000),
    "rnn_tanh_cell": Worth(2, 1_000_000, 3_000_000),
    "rnn_relu_cell": Worth(2, 1_000_000, 3_000_000),
}
ON_GPU = "on a GPU torch's operators are left as they are unless a backend is forced"
TOO_SMALL = "so little work is faster on torch's kernel than on its way here"


def is_worth(op: str, steps: int, batch: int, w_ih: Tensor, w_hh: Tensor) -> bool:
    least = WORTH[op]
    if steps >= least.steps:
        return True
    numbers = w_ih.numel() + w_hh.numel()
    return numbers >= least.numbers or numbers * batch >= least.products


def takes_recurrent(op: str, worth: bool, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether a recurrent call is ours; ``worth`` is `is_worth` of it."""
    if not _backend.special:
        return worth and _backend.serves_cpu(tensors) and not _backend.torch_outruns(op, tensors)
    call = Call(op, tensors)
    if not worth and _backend.forced() is None:
        return declined(call, (("cpu", TOO_SMALL),))
    return takes(call)


def takes(call: Call) -> bool:
    """Whether a kernel of this package, or the backend that the user forces, runs a call; `watch` sees a no."""
    forced = _backend.forced()
    if forced is None and _surroundings.in_transform():
        return False
    if forced == "torch":
        return declined(call, ())
    if forced is None and (input := call.tensors[0]) is not None and not input.is_cpu:
        return declined(call, (("seqkern", ON_GPU),))
    choice = _backend.pick(call)
    if forced is not None or choice.name in _backend.BY_OPS:
        return True
    return declined(call, tuple(each for each in choice.declined if each[0] != "torch"))


def declined(call: Call, reasons: tuple[tuple[str, str], ...]) -> bool:
    """Shows `watch` that a call stays torch's; False."""
    _backend.note(call, Choice("torch", reasons))
    return False


@cache
def attention_has_kernels(device: str) -> bool:
    """Whether any kernel of this package computes attention on such a device, left to itself."""
    if device != "cpu":  # see ON_GPU
        return False
    t = Tensors(*(torch.empty((1, 1, 1, 16), device=device) for _ in range(3)))
    return _backend.declines("cpu", Call("attention", t, Wanted(Options(0.25)))) is None
