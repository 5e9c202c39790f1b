"""Fused kernels for PyTorch sequence models, as drop-in modules.

>>> import torch, seqkern
>>> lstm = seqkern.nn.LSTM(3, 4)              # torch.nn's name, constructor, state_dict and results
>>> output, (h_n, c_n) = lstm(torch.randn(5, 2, 3))

Names are loaded when first used. Importing the package swaps nothing and compiles nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from seqkern._version import __version__

if TYPE_CHECKING:
    from seqkern import functional, nn
    from seqkern.dispatcher import disable, enable
    from seqkern.explanation import explain
    from seqkern.ops._backend import backend
    from seqkern.swap import accelerate, restore, swaps
    from seqkern.verification import VerificationError, verify

_HOMES = {
    "accelerate": "seqkern.swap",
    "restore": "seqkern.swap",
    "swaps": "seqkern.swap",
    "enable": "seqkern.dispatcher",
    "disable": "seqkern.dispatcher",
    "explain": "seqkern.explanation",
    "verify": "seqkern.verification",
    "VerificationError": "seqkern.verification",
    "backend": "seqkern.ops._backend",
    "functional": None,
    "nn": None,
}

__all__ = [
    "VerificationError",
    "__version__",
    "accelerate",
    "backend",
    "disable",
    "enable",
    "explain",
    "functional",
    "nn",
    "restore",
    "swaps",
    "verify",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    found = import_module(f"{__name__}.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
