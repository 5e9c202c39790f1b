"""The cells as pointwise steps on float32 tiles: the Triton twins of spec/cells.py.

A cell sees tuples of tiles, one for each gate or state; never time, pointers or layout.

- ``fwd(x, r, state) -> (state, reserve)``: pre-activations x[G] of the input and r[G] of the recurrence. Where not
  APART, x already holds their sum and r is not read.
- ``bwd(reserve, state, dstate) -> (dx, dr, dstate)``: the state before the step and the gradients of the state after
  it, to the gradients of the pre-activations and of the state before, less what goes through the recurrent matmul.
  dr is dx where not APART. state[0] is read only where APART, dstate[0] comes back as zeros otherwise.

A cell that reserves nothing (R = 0) hands over its h in place of a reserve: its backward reads it from the output.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqkern.kernels.math import relu, relu_bwd, sigmoid, sigmoid_bwd, tanh, tanh_bwd


class Cell(NamedTuple):
    """The two steps of a cell and the sizes a scan needs to run them."""

    fwd: Any
    bwd: Any
    G: int  # gates
    R: int  # tiles saved for backward
    APART: bool  # whether x and r are more than a sum
    HAS_C: bool  # whether the state is (h, c)


@triton.jit
def lstm_fwd(x, r, state):
    i = sigmoid(x[0])
    f = sigmoid(x[1])
    g = tanh(x[2])
    o = sigmoid(x[3])
    c = f * state[1] + i * g
    h = o * tanh(c)
    return (h, c), (i, f, g, o, c)


@triton.jit
def lstm_bwd(reserve, state, dstate):
    i = reserve[0]
    f = reserve[1]
    g = reserve[2]
    o = reserve[3]
    tanh_c = tanh(reserve[4])
    dh = dstate[0]
    dc = dstate[1] + tanh_bwd(tanh_c, dh * o)
    dx = (
        sigmoid_bwd(i, dc * g),
        sigmoid_bwd(f, dc * state[1]),
        tanh_bwd(g, dc * i),
        sigmoid_bwd(o, dh * tanh_c),
    )
    return dx, dx, (tl.zeros_like(dh), dc * f)


@triton.jit
def gru_fwd(x, r, state):
    reset = sigmoid(x[0] + r[0])
    update = sigmoid(x[1] + r[1])
    new = tanh(x[2] + reset * r[2])
    h = new + update * (state[0] - new)
    return (h,), (reset, update, new, r[2])


@triton.jit
def gru_bwd(reserve, state, dstate):
    reset = reserve[0]
    update = reserve[1]
    new = reserve[2]
    dh = dstate[0]
    dnew = tanh_bwd(new, dh * (1.0 - update))
    dreset = sigmoid_bwd(reset, dnew * reserve[3])
    dupdate = sigmoid_bwd(update, dh * (state[0] - new))
    return (dreset, dupdate, dnew), (dreset, dupdate, dnew * reset), (dh * update,)


@triton.jit
def rnn_tanh_fwd(x, r, state):
    h = tanh(x[0])
    return (h,), (h,)


@triton.jit
def rnn_tanh_bwd(reserve, state, dstate):
    dx = (tanh_bwd(reserve[0], dstate[0]),)
    return dx, dx, (tl.zeros_like(dstate[0]),)


@triton.jit
def rnn_relu_fwd(x, r, state):
    h = relu(x[0])
    return (h,), (h,)


@triton.jit
def rnn_relu_bwd(reserve, state, dstate):
    dx = (relu_bwd(reserve[0], dstate[0]),)
    return dx, dx, (tl.zeros_like(dstate[0]),)


CELLS: dict[str, Cell] = {
    "lstm": Cell(lstm_fwd, lstm_bwd, G=4, R=5, APART=False, HAS_C=True),
    "gru": Cell(gru_fwd, gru_bwd, G=3, R=4, APART=True, HAS_C=False),
    "rnn_tanh": Cell(rnn_tanh_fwd, rnn_tanh_bwd, G=1, R=0, APART=False, HAS_C=False),
    "rnn_relu": Cell(rnn_relu_fwd, rnn_relu_bwd, G=1, R=0, APART=False, HAS_C=False),
}
