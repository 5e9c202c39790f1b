"""What the kernels can run on here: dtypes, devices, and what this installation lacks."""

import importlib.util
import os

import torch
from torch import Tensor

from seqkern.ops import _library
from seqkern.ops._surroundings import as_constant

CPU_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
TRITON_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))

CPU_READY = _library.native() is not None
CPU_MISSING = _library.why_missing()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, slowly, for tests


def find_triton() -> str:
    """What to do about Triton where there is none; empty where it is installed."""
    try:
        found = importlib.util.find_spec("triton")
    except (ImportError, ValueError):  # blocked, or None in sys.modules, or without a spec
        found = None
    return "" if found else "Triton is not installed; pip install triton"


TRITON_MISSING = find_triton()


def not_one_of(dtype: torch.dtype, dtypes: frozenset[torch.dtype]) -> str | None:
    """Why kernels for some dtypes do not take another; None if it is one of them."""
    if dtype in dtypes:
        return None
    return f"the dtype is {dtype}, not one of {', '.join(sorted(map(str, dtypes)))}"


@as_constant
def too_old(index: int) -> str | None:
    """Why Triton's tensor cores do not know a GPU; None if they do, and for AMD's."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(index) >= (8, 0):
        return None
    return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"


def lacks_triton(tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why the Triton kernels of recurrent layers cannot run on these tensors where they lie."""
    if TRITON_MISSING:
        return TRITON_MISSING
    for t in tensors:
        if t is None:
            continue
        if reason := not_one_of(t.dtype, TRITON_DTYPES):
            return reason
        if t.is_cuda and (reason := too_old(t.device.index or 0)):
            return reason
        if not t.is_cuda and t.dtype == torch.bfloat16:
            return "Triton's interpreter multiplies bfloat16 wrongly"
    return None
