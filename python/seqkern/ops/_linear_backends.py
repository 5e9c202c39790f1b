"""Whose matmul is the faster one for a linear layer: fixed rules, from measurements that docs/decisions.md tells of."""

from collections.abc import Callable, Sequence

import torch

from seqkern.ops import _library
from seqkern.ops._surroundings import expects_grad

FEW_ROWS = 16  # for which weights are read as they lie
FEW_ROWS_OF_16_BITS = 4
WEIGHTS_WORTH_IT = 250_000  # of such a layer
# Of float32 and float64 where MKL_IS_AT_HOME: fewer rows are gemv's, fewer weights cached.
ROWS_WORTH_IT, WEIGHTS_WORTH_IT_BESIDE_MKL = 4, 500_000
WEIGHTS_TERM_BY_TERM = 4_000  # where torch multiplies TERM_BY_TERM, or CONVERTED
FLOP_WORTH_PACKING = 10e6  # of a layer of more rows
FLOP_WORTH_A_GRADIENT = 50e6  # of one that is differentiated
FLOP_TERM_BY_TERM = 1e6  # where torch multiplies TERM_BY_TERM, or CONVERTED
BF16_ROWS_WORTH_PACKING = 512  # at most: torch's own dots are level with ours from there on
ROWS_WORTH_A_GRADIENT = (
    512  # of weights, in float32: fewer are sums of so few products that torch's are faster
)

BF16_DOT = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # our kernels and torch's use it
BF16_TILES = getattr(torch.cpu, "_is_amx_tile_supported", bool)()  # AMX: torch's kernels alone use it

_native = _library.native()
_ISAS = _native.isas() if _native is not None else []
# Where torch multiplies by an MKL that was made for another vendor's processors.
DENSE = (
    _native is not None
    and "avx2" in _ISAS
    and _native.cpu_vendor() == "amd"
    and torch.backends.mkl.is_available()
)
# And where it was made for this one.
MKL_IS_AT_HOME = _native is not None and _native.cpu_vendor() == "intel" and torch.backends.mkl.is_available()
WIDE = _library.is_wide()


def _by_onednn(supported: Callable[[], bool] | None) -> bool:
    """Whether torch's oneDNN multiplies such numbers here; True where torch does not tell."""
    try:
        return supported is None or bool(supported())
    except (AttributeError, RuntimeError):
        return True


# Dtypes whose matmuls torch runs as plain loops, since its oneDNN has no kernel for them on this processor.
TERM_BY_TERM = frozenset(
    dtype
    for dtype, name in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    )
    if "avx2" in _ISAS and not _by_onednn(getattr(torch.ops.mkldnn, name, None))
)

# Without dots, and without the tiles of AMX, oneDNN converts bfloat16 as it multiplies: a fifth of float32's speed.
CONVERTED = (
    frozenset((torch.bfloat16,)) if "avx512" in _ISAS and not (BF16_DOT or BF16_TILES) else frozenset()
)


# Dtypes of which nothing but few rows of large layers without a gradient is ours.
_MULTIPLIED_WELL = frozenset((torch.float64,) if DENSE else (torch.float32, torch.float64))


def _lacks_dots(dtype: torch.dtype) -> bool:
    return dtype in TERM_BY_TERM or dtype in CONVERTED


def few_rows(dtype: torch.dtype) -> int:
    """For how many rows at most weights are read as they lie."""
    return FEW_ROWS if dtype.itemsize > 2 else FEW_ROWS_OF_16_BITS


def _weights_worth_it(rows: int, dtype: torch.dtype) -> int | None:
    """How many weights a layer of few rows must have, without a gradient; None where no number makes it worth it."""
    if _lacks_dots(dtype):
        return WEIGHTS_WORTH_IT if rows == 1 and dtype is torch.bfloat16 else WEIGHTS_TERM_BY_TERM
    if not MKL_IS_AT_HOME or dtype.itemsize == 2 or rows == FEW_ROWS:
        return WEIGHTS_WORTH_IT
    return WEIGHTS_WORTH_IT_BESIDE_MKL if rows >= ROWS_WORTH_IT else None


def torch_outruns(rows: int, weight: torch.Tensor, grad: bool) -> str | None:
    """Why torch's kernel is the faster one, or None."""
    dtype = weight.dtype
    if not grad and rows <= few_rows(dtype):
        least = _weights_worth_it(rows, dtype)
        if least is None:
            return "a linear layer of so few rows"
        return "a linear layer of few weights" if weight.numel() < least else None
    flop = 2 * rows * weight.numel()
    if _lacks_dots(dtype):
        return "a linear layer so small" if flop < FLOP_TERM_BY_TERM else None
    if not DENSE or dtype not in (torch.float32, torch.bfloat16):
        return "a linear layer of many rows" if not grad else "a linear layer with a gradient"
    if dtype is torch.bfloat16 and (grad or not BF16_DOT or rows > BF16_ROWS_WORTH_PACKING):
        return "a linear layer of bfloat16"
    least = FLOP_WORTH_A_GRADIENT if grad else FLOP_WORTH_PACKING
    return "a linear layer so small" if flop < least else None


def torch_outruns_layer(tensors: Sequence[torch.Tensor | None]) -> str | None:
    """`torch_outruns` of a call: input, weight and bias."""
    input, weight = tensors[:2]
    assert input is not None and weight is not None
    if torch.compiler.is_compiling():
        return "a linear layer that a compiler fuses"
    return torch_outruns(input.numel() // max(1, weight.size(1)), weight, expects_grad(tensors))


def torch_has_it(input: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch's kernel is the faster one for the layer: what a module asks first, as most calls end here."""
    if not input.is_cpu or weight.dim() != 2:
        return True
    if weight.dtype in _MULTIPLIED_WELL and (weight.numel() < WEIGHTS_WORTH_IT or torch.is_grad_enabled()):
        return True
    grad = torch.is_grad_enabled() and (weight.requires_grad or input.requires_grad)
    return torch_outruns(input.numel() // max(1, weight.size(-1)), weight, grad) is not None


def gradient_of_weights_is_ours(rows: int, dtype: torch.dtype) -> bool:
    """Of a layer whose output and gradient of the input are ours."""
    if _lacks_dots(dtype) or dtype is torch.float64:
        return True
    return WIDE and rows >= ROWS_WORTH_A_GRADIENT
