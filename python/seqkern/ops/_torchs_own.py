"""torch's own kernels, called past what `seqkern.enable` has put in their place."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch

R = TypeVar("R")

standing_in = False  # whether torch's dispatcher sends calls to this package: `seqkern.enable`


class _Here(threading.local):
    own = False  # this thread asked for torch's own kernel


here = _Here()


def call(kernel: Callable[..., R], *args, **kwargs) -> R:
    """A function of torch that runs torch's kernel, whatever `seqkern.enable` has done."""
    if not standing_in or torch.compiler.is_dynamo_compiling():
        return kernel(*args, **kwargs)
    before, here.own = here.own, True
    try:
        return kernel(*args, **kwargs)
    finally:
        here.own = before
