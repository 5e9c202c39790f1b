"""The ops under the CUDA key: each calls the launcher of its Triton kernel, which is imported when first called.

With TRITON_INTERPRET=1 the same launchers also serve CPU tensors where the backend ``triton`` is forced.
"""

import warnings
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from seqkern.ops import _backend, _hardware


@cache
def _launcher(module: str, function: str) -> Any:
    return getattr(import_module(module), function)


def serve(library: torch.library.Library, op: str, module: str, function: str) -> None:
    """Registers ``module.function`` for an op of the library: same arguments, same results."""

    def launch(*arguments: Any) -> Any:
        tensors = tuple(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
        if reason := _hardware.lacks_triton(tensors):
            raise RuntimeError(f"seqkern::{op} cannot run on this GPU: {reason}")
        return _launcher(module, function)(*arguments)

    library.impl(op, launch, "CUDA")
    if not _hardware.INTERPRETED:
        return
    compiled = torch.library.get_kernel(f"seqkern::{op}", "CPU") if _hardware.CPU_READY else None

    def interpret(keys: Any, *arguments: Any) -> Any:
        if compiled is None or _backend.forced() == "triton":
            return launch(*arguments)
        return compiled.call_boxed(keys, *arguments)

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Warning only once for all operators"
        )  # torch's, of what is meant here
        library.impl(op, interpret, "CPU", with_keyset=True, allow_override=True)
