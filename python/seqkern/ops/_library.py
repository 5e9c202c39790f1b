"""Finds the compiled part of the package, and remembers why it is missing where it is."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return import_module("seqkern._native"), ""
    except ModuleNotFoundError as e:
        if e.name != "seqkern._native":
            return None, str(e)
        return (
            None,
            "seqkern was installed without its compiled kernels (no C++ compiler was found at install)",
        )
    except ImportError as e:  # built for another Python or linked against what this machine lacks
        return None, f"the compiled kernels could not be loaded: {e}"


def native() -> ModuleType | None:
    """The pybind11 module ``seqkern._native``, or None. Loading it registers the CPU kernels."""
    return _load()[0]


def why_missing() -> str:
    """Why `native` is None, in a sentence; empty if it is not."""
    return _load()[1]
