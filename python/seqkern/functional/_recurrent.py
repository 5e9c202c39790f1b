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
    grad = _surroundings.needs_grad(tensors)
    if grad and not torch.compiler.is_compiling():
        tensors = _apart(tensors)
    if not _surroundings.is_looked_on():
        return direct_rnn(*tensors, cell, grad)
    return _forward(*tensors, cell, grad and not _surroundings.in_trace())


def _apart(tensors: Weights) -> Weights:
    """The tensors, with copies of those that torch's layers do not keep and callers may write to: the input where no
    W_ih is trained, h where no W_hh is, and the biases of layers that are trained in part."""
    input, batch_sizes, hx, cx, *weights = tensors
    w_ih, w_hh = weights[0::5], weights[1::5]
    frozen = [not any(w is not None and w.requires_grad for w in each) for each in (w_ih, w_hh)]
    if not any(frozen):
        return tensors
    assert input is not None and hx is not None
    for at in (2, 3, 7, 8):
        b = weights[at]
        weights[at] = b if b is None else b.clone()
    return (input.clone() if frozen[0] else input, batch_sizes, hx.clone() if frozen[1] else hx, cx, *weights)


def backend_name(backend: str | None, op: str, tensors: Weights, packed: bool = False) -> str:
    if backend is None and not _backend.special and _backend.serves_cpu(tensors):
        return "torch" if _backend.torch_outruns(op, tensors) else "cpu"
    check_uniform(op, packed, tensors)
    return _backend.choose(_backend.Call(op, tensors), backend).name


def rnn_of(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"RNN: nonlinearity is {nonlinearity!r}, expected 'tanh' or 'relu'")
    return f"rnn_{nonlinearity}"
