"""What recurrent cells and layers share: the way to the op, and the name of the backend that serves."""

import torch
from torch import Tensor

from seqkern.ops import _backend, _surroundings
from seqkern.ops._recurrent_checks import check_uniform
from seqkern.ops.rnn import direct_rnn

_forward = torch.ops.seqkern.rnn_forward.default

Weights = tuple[Tensor | None, ...]  # w_ih, w_hh, b_ih, b_hh, w_hr of one direction
NO_BACKWARD: tuple[None, ...] = (None,) * 5  # the weights of a second direction


def call_op(tensors: Weights, cell: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, which keeps what a backward needs where a gradient is needed. In torch.jit.trace, whose check compares
    the graph with one made without gradients, it keeps nothing: a backward through a trace computes it anew."""
    if not _surroundings.is_looked_on():
        return direct_rnn(*tensors, cell, _surroundings.needs_grad(tensors))
    return _forward(*tensors, cell, _surroundings.expects_grad(tensors))


def backend_name(backend: str | None, op: str, tensors: Weights, packed: bool = False) -> str:
    if backend is None and not _backend.special and _backend.serves_cpu(tensors):
        return "torch" if _backend.torch_outruns(op, tensors) else "cpu"
    check_uniform(op, packed, tensors)
    return _backend.choose(_backend.Call(op, tensors), backend).name


def rnn_of(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}, expected 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"
