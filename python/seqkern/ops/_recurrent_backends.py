"""Whose kernel is the faster one for a recurrent layer or cell: fixed rules, from measurements that docs/decisions.md
tells of."""

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor

from seqkern.ops import _linear_backends
from seqkern.ops._surroundings import expects_grad, needs_grad

CELL_WORTH_A_GRADIENT = 4_000_000  # weights, states and input of one step
STEPS_BELOW_A_GRADIENT = {"gru": 1, "rnn_tanh": 3, "rnn_relu": 3}
BF16_STEPS_BELOW_A_GRADIENT = STEPS_BELOW_A_GRADIENT | {"gru": 3}  # where dots make torch's steps short
# Below them a sequence is over on cuDNN before the launches of Triton pay, which a backward has more of.
GPU_STEPS, GPU_STEPS_BELOW_A_GRADIENT = 16, 64


def lacks_features(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether input or state has no features, which torch's cells take and a kernel here does not."""
    input, hx = tensors[:2]
    return (input is not None and input.shape[-1] == 0) or (hx is not None and hx.shape[-1] == 0)


def torch_outruns(op: str, tensors: Sequence[Tensor | None]) -> str | None:
    """Why torch's kernel is the faster one on a CPU, or None."""
    if torch.compiler.is_compiling():  # which pays nothing for an op's gradient
        return None
    input, hx, cx = tensors[:3]
    assert input is not None and hx is not None
    grad = expects_grad(tensors)
    if op.endswith("_cell"):
        if not grad:
            return None
        size = sum(t.numel() for t in tensors if t is not None and t.dim() == 2)
        return "a gradient of so small a step" if size < CELL_WORTH_A_GRADIENT else None
    if input.dim() == 2:  # packed
        return None
    steps, batch, _ = input.shape
    dots = input.dtype is torch.bfloat16 and _linear_backends.BF16_DOT
    if grad and steps <= (BF16_STEPS_BELOW_A_GRADIENT if dots else STEPS_BELOW_A_GRADIENT).get(op, 0):
        return "a gradient of so few steps"
    projected = cx is not None and cx.shape[-1] != hx.shape[-1]
    if input.dtype is not torch.bfloat16 or not _linear_backends.BF16_TILES or projected:
        return None
    slower = (batch >= 8 or not grad) if op == "lstm" else (batch >= 32 and hx.shape[-1] >= 512)
    return "bfloat16 on a machine that multiplies it in tiles (AMX)" if slower else None


def _directions(hx: Tensor, weights: Sequence[Tensor | None]) -> int:
    """Directions of a stack of layers, of which each has as many weights; two where nothing tells."""
    groups, each = hx.shape[0], len(weights) // max(hx.shape[0], 1)
    if groups % 2 or len(weights) <= each:
        return 1
    first, second = weights[0], weights[each]
    return 2 if first is None or second is None or first.shape == second.shape else 1


def torch_outruns_on_gpu(op: str, tensors: tuple[Tensor | None, ...]) -> str | None:
    """Why cuDNN runs a recurrent layer on a Hopper GPU."""
    input, hx, cx = tensors[:3]
    assert input is not None and hx is not None
    if op.endswith("_cell"):
        return "a single step takes as long to launch on torch's kernel"
    if input.dtype != torch.bfloat16:
        return f"cuDNN is faster in {str(input.dtype)[6:]}"
    B, H = hx.shape[-2:]
    steps = input.shape[0] // (1 if input.dim() == 3 else max(B, 1))
    if steps < (GPU_STEPS_BELOW_A_GRADIENT if needs_grad(tensors) else GPU_STEPS):
        return "so few steps take as long to launch on torch's kernel"
    if input.dim() == 2 and torch.cuda.is_current_stream_capturing():
        return "a packed call cannot be captured in a CUDA graph"
    rnn = import_module("seqkern.kernels.rnn")  # not at the top: it imports Triton
    projected = cx is not None and cx.shape[-1] != H
    D, tiles = _directions(hx, tensors[3:]), -(-B // 16) * 16
    if projected or not rnn.in_one_launch(op, input.dtype, input.device, tiles, H, D):
        return "its steps would be launched one by one"
    return None
