r"""The unroll: time, layout, the recurrent matmul, LSTM's output projection and variable lengths, for every cell.

.. math::
    h_t = W_{hr}\, h'_t \quad\text{where}\quad (h'_t, \ldots) = \mathrm{step}(W_{ih} u_t + b_{ih},\;
    W_{hh} h_{t-1} + b_{hh},\; s_{t-1})

(:math:`W_{hr}` is the identity unless the layer projects: Sak, Senior and Beaufays 2014, arXiv:1402.1128.)
Sizes: T steps, B sequences, I inputs, H hidden, P outputs of a step (H, or the projection), D directions, G gates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqkern.spec.cells import CELLS

Weights = Sequence[Tensor | None]  # w_ih [G*H, I], w_hh [G*H, P], b_ih [G*H], b_hh [G*H], w_hr [P, H]


def _advance(cell: str, x: Tensor, state: tuple[Tensor, ...], weights: Weights) -> tuple[Tensor, ...]:
    _, w_hh, _, b_hh, w_hr = weights
    state, _ = CELLS[cell].step(x, linear(state[0], w_hh, b_hh), state)  # type: ignore[arg-type]
    return state if w_hr is None else (linear(state[0], w_hr), *state[1:])


def step(cell: str, input: Tensor, state: tuple[Tensor, ...], weights: Weights) -> tuple[Tensor, ...]:
    """One step: input [B, I], state (h [B, P], and for lstm c [B, H]) -> the next state."""
    w_ih, _, b_ih, _, _ = weights
    return _advance(cell, linear(input, w_ih, b_ih), state, weights)  # type: ignore[arg-type]


def scan(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    state: tuple[Tensor, ...],
    weights: Weights,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer in one direction.

    input is [T, B, I], or packed [N, I] with ``batch_sizes`` [T] (non-increasing, summing to N; step t holds the first
    ``batch_sizes[t]`` sequences). state holds h [B, P] and for lstm c [B, H]. Returns the output in the input's layout
    with P features, and each sequence's state after its last step (its first step in time if ``reverse``).
    """
    w_ih, _, b_ih, _, _ = weights
    x = linear(input, w_ih, b_ih)  # type: ignore[arg-type]
    steps = x.unbind(0) if batch_sizes is None else x.split(batch_sizes.tolist())
    outputs: list[Tensor] = []
    for x_t in reversed(steps) if reverse else steps:
        live = x_t.shape[0]
        now = _advance(cell, x_t, tuple(s[:live] for s in state), weights)
        outputs.append(now[0])
        # Sequences that have ended, or in reverse have not begun, keep the state they have.
        state = (
            now
            if live == state[0].shape[0]
            else tuple(torch.cat((new, old[live:])) for new, old in zip(now, state, strict=True))
        )
    if reverse:
        outputs.reverse()
    return (torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)), state


def layer(
    cell: str,
    input: Tensor,
    batch_sizes: Tensor | None,
    hx: Tensor,
    cx: Tensor | None,
    weights: Weights,
    reverse_weights: Weights | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one direction, or in both if ``reverse_weights`` is given.

    hx [D, B, P] and for lstm cx [D, B, H] -> output [..., D*P], h_n [D, B, P], c_n [D, B, H] or None.
    """
    directions = [weights] if reverse_weights is None else [weights, reverse_weights]
    outputs, states = [], []
    for d, ws in enumerate(directions):
        state = (hx[d],) if cx is None else (hx[d], cx[d])
        output, last = scan(cell, input, batch_sizes, state, ws, reverse=d == 1)
        outputs.append(output)
        states.append(last)
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
    h_n, *c_n = (torch.stack(s) for s in zip(*states, strict=True))
    return output, h_n, c_n[0] if c_n else None
