"""From the arguments of the attention ops to the arguments of their kernels."""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqkern.kernels.mods import Mods, Operand, Packed, Plane
from seqkern.kernels.tuning import precision
from seqkern.kernels.tuning_attention import Shape, may_be_tf32

FARTHEST = 2**30  # a window beyond this is no window; sums of it with a position stay in int32


class Launch(NamedTuple):
    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int


class RowValues(NamedTuple):
    """One number for each query of each head: [B, H, L], or packed [H, total] with batch stride 0."""

    p: Tensor
    batch: int
    head: int
    row: int = 1


class Call(NamedTuple):
    """What every kernel of one call shares."""

    q: Tensor
    k: Tensor
    v: Tensor
    B: int
    Hq: int
    G: int
    L: int
    S: int
    mods: Mods
    packed: Packed | None
    sinks: Tensor | None
    shape: Shape
    constants: dict[str, Any]

    @property
    def retries(self) -> bool:
        """See `attend_all`. On sm_80 what may run twice spills, and Triton 3.6 cannot compile it for sm_100."""
        return 90 <= self.shape.arch < 100

    def row_values(self, x: Tensor) -> RowValues:
        return RowValues(x, 0 if self.packed is not None else x.stride(0), x.stride(-2))


def unit_last(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension is not laid out densely."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def operand(x: Tensor) -> Operand:
    if x.dim() == 3:  # packed [total, H, size]
        return Operand(x, 0, x.stride(1), x.stride(0))
    return Operand(x, x.stride(0), x.stride(1), x.stride(2))


def plane(x: Tensor | None) -> Plane | None:
    return None if x is None else Plane(x, *(0 if n == 1 else s for n, s in zip(x.shape, x.stride())))


def architecture(x: Tensor) -> int:
    """Compute capability as one number, 90 for Hopper; 80 stands for what is not an NVIDIA GPU."""
    if x.device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def prepare(t, o) -> Call:
    q, k, v = unit_last(t.query), unit_last(t.key), unit_last(t.value)
    is_packed = t.cu_seqlens_q is not None
    if is_packed:
        B, L, S = t.cu_seqlens_q.shape[0] - 1, o.max_seqlen_q, o.max_seqlen_k
        packed = Packed(t.cu_seqlens_q.contiguous(), t.cu_seqlens_k.contiguous(), q.shape[0], k.shape[0])
    else:
        B, L, S, packed = q.shape[0], q.shape[2], k.shape[2], None
    Hq, G = q.shape[1], q.shape[1] // max(k.shape[1], 1)
    slopes = None
    if t.alibi_slopes is not None:
        wide = t.alibi_slopes.float()
        slopes = (wide, wide.stride(0) if wide.dim() == 2 else 0, wide.stride(-1))
    dropped = o.dropout_p > 0
    mods = Mods(
        None if t.mask is None else plane(t.mask.view(torch.uint8)),
        plane(t.bias),
        slopes,
        o.softcap or None,
        min(o.window_left, FARTHEST) if o.window_left >= 0 else None,
        min(o.window_right, FARTHEST) if o.window_right >= 0 else None,
        t.seed if dropped else None,
        round(o.dropout_p * 2**24) if dropped else None,
        (1 / (1 - o.dropout_p) if o.dropout_p < 1 else 0.0) if dropped else None,
    )
    D, DV = q.shape[-1], v.shape[-1]
    BLOCK_D, BLOCK_DV = (max(16, triton.next_power_of_2(n)) for n in (D, DV))
    size, arch = max(BLOCK_D, BLOCK_DV), architecture(q)
    constants = {
        "D": D,
        "DV": DV,
        "BLOCK_D": BLOCK_D,
        "BLOCK_DV": BLOCK_DV,
        "PRECISION": precision(q.dtype) if may_be_tf32(arch, size) else "ieee",
    }
    extras = sum(x is not None for x in (mods.mask, mods.bias, mods.seed))
    tf32 = constants["PRECISION"] == "tf32"
    shape = Shape(arch, q.element_size(), size, extras, L * G, tf32)
    sinks = None if t.sinks is None else t.sinks.contiguous()
    return Call(q, k, v, B, Hq, G, L, S, mods, packed, sinks, shape, constants)


def run(launch: Launch) -> None:
    if launch.programs:
        launch.kernel[(launch.programs,)](
            **launch.arguments, num_warps=launch.num_warps, num_stages=launch.num_stages
        )
