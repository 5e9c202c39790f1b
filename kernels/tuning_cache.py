"""Configurations that come before the rules: those that a caller forces, and those measured on this machine.

`seqkern tune` keeps what it measured in the user's cache directory: one file for the recurrent and the attention
kernels, each choice under a key that `tuning` and `tuning_attention` make.
"""

import ctypes
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

# How many numbers a configuration has, by how the names of its kernels begin.
NUMBERS = {"sequence": 5, "step": 5, "attention": 4}


class Force(NamedTuple):
    """What a caller puts before everything else."""

    configs: Mapping[str, tuple[int, ...]]
    steps: bool  # whether recurrent layers run step by step
    persistent: bool = False  # whether they run by the persistent kernels, where those take them
    portable: bool = False  # whether attention leaves out the kernels for one architecture


force: ContextVar[Force] = ContextVar("seqkern_tuning", default=Force({}, False))  # noqa: B039


@contextmanager
def forced(
    configs: Mapping[str, tuple[int, ...]],
    steps: bool = False,
    persistent: bool = False,
    portable: bool = False,
) -> Iterator[None]:
    """Puts configurations, by key, before all others in the block. With ``steps`` recurrent layers run step by step,
    with ``persistent`` by the persistent kernels, where those take them; with ``portable`` attention runs by the
    kernels that serve every architecture."""
    token = force.set(Force(configs, steps, persistent, portable))
    try:
        yield
    finally:
        force.reset(token)


def cache_file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "seqkern" / "tuning.json"


def driver_version() -> int:
    """The CUDA version that the driver serves, as the driver writes it; 0 without a driver."""
    try:
        answer = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(answer))
    except (OSError, AttributeError):
        return 0
    return answer.value


def machine() -> dict[str, Any]:
    """What a measurement holds for."""
    try:
        version = metadata.version("seqkern")
    except metadata.PackageNotFoundError:
        version = ""
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "driver": driver_version(),
        "triton": triton.__version__,
        "seqkern": version,
    }


def numbers(key: str, values: Any) -> tuple[int, ...]:
    """The values of an entry, as many as its kernel takes, all powers of two but the last, the stages.

    Raises:
        ValueError: they are something else.
    """
    family, _, _ = key.partition("_")
    whole = len(values) == NUMBERS.get(family) and all(type(v) is int and v > 0 for v in values)
    if not whole or any(v & (v - 1) for v in values[:-1]):
        raise ValueError(f"{key} is {values}")
    return tuple(values)


def read(path: Path, here: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The choices in a cache file that were measured here. A file that is not one warns and counts as empty."""
    try:
        entries = json.loads(path.read_text())["machines"]
        found = {}
        for entry in entries:
            if entry["machine"] == here:
                found |= {key: numbers(key, values) for key, values in entry["configs"].items()}
        return found
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        warnings.warn(
            f"{path} is not a file of `seqkern tune` and is ignored ({type(e).__name__}: {e}); "
            "delete it or run `seqkern tune` again",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def write(path: Path, here: dict[str, Any], configs: Mapping[str, tuple[int, ...]]) -> None:
    """Puts choices in place of those kept for the same machine; other machines' stay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a broken file is replaced
        old = read(path, here)
    try:
        kept = [e for e in json.loads(path.read_text())["machines"] if e["machine"] != here]
    except (OSError, ValueError, KeyError, TypeError):
        kept = []
    entry = {"machine": here, "configs": {k: list(c) for k, c in sorted({**old, **configs}.items())}}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps({"machines": [*kept, entry]}, indent=1) + "\n")
    os.replace(scratch, path)


@cache
def measured() -> dict[str, tuple[int, ...]]:
    """The choices measured on this machine, read once."""
    path = cache_file()
    return read(path, machine()) if path.is_file() else {}


def preferred(key: str) -> tuple[int, ...] | None:
    """The numbers of the configuration that comes before the rules, if there is one."""
    return force.get().configs.get(key) or measured().get(key)
