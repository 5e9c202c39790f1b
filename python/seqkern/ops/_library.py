"""Finds the compiled part of the package, and remembers why it is missing where it is."""

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  # first: the compiled part finds torch's libraries by name


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return import_module("seqkern._native"), ""
    except ModuleNotFoundError as e:
        if e.name != "seqkern._native":
            return None, str(e)
        return None, f"seqkern was installed without its compiled kernels: {_why_not_built()}"
    except ImportError as e:  # built for another Python or linked against what this machine lacks
        return None, f"the compiled kernels could not be loaded: {e}"


def _why_not_built() -> str:
    """What setup.py wrote down at install."""
    record = Path(__file__).parents[1] / "_build.json"
    found = json.loads(record.read_text())["reason"] if record.is_file() else ""
    remedy = "mend that and install seqkern again, with SEQKERN_BUILD=cpu to see every error"
    return f"{found or 'they were not built (a C++ compiler, g++ >= 11, is needed)'}; {remedy}"


def native() -> ModuleType | None:
    """The pybind11 module ``seqkern._native``, or None. Loading it registers the CPU kernels."""
    return _load()[0]


def why_missing() -> str:
    """Why `native` is None, in a sentence; empty if it is not."""
    return _load()[1]


def is_wide() -> bool:
    """Whether the kernels have vectors of 64 bytes here."""
    found = native()
    return found is not None and "avx512" in found.isas()
