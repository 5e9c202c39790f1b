"""``aten::lstm``, ``gru``, ``rnn_tanh``, ``rnn_relu``, their packed forms and their cells."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from seqkern import functional
from seqkern.dispatcher.choice import is_worth, takes_recurrent
from seqkern.ops import _backend, _torchs_own

FUNCTIONS = {
    "lstm": (functional.lstm, functional.lstm_cell),
    "gru": (functional.gru, functional.gru_cell),
    "rnn_tanh": (functional.rnn, functional.rnn_cell),
    "rnn_relu": (
        partial(functional.rnn, nonlinearity="relu"),
        partial(functional.rnn_cell, nonlinearity="relu"),
    ),
}


def _states(cell: str, hx) -> tuple[Tensor | None, ...]:
    return tuple(hx) if cell == "lstm" else (hx, None)


def _ours(
    cell: str, input: Tensor, steps: int, batch: int, hx, params, layers: int, bidirectional: bool
) -> bool:
    worth = is_worth(cell, steps, batch, params[0], params[1])
    if _torchs_own.here.own or not (worth or _backend.special):
        return False
    states = _states(cell, hx)
    h = states[0] if len(states) == 2 else None
    # torch's operators broadcast a state of another shape, or raise.
    if h is None or h.dim() != 3 or h.shape[:2] != (layers * (2 if bidirectional else 1), batch):
        return False
    return takes_recurrent(cell, worth, (input, *states, *params))


def _result(cell: str, found):
    output, state = found
    return (output, *state) if cell == "lstm" else (output, state)


def dense(cell: str, own: Callable) -> Callable:
    """``aten::<cell>.input``."""
    function = FUNCTIONS[cell][0]

    def run(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        ours = input.dim() == 3 and len(params) > 1
        if ours:
            steps_first = input.transpose(0, 1) if batch_first else input
            steps, batch, _ = steps_first.shape
            ours = _ours(cell, steps_first, steps, batch, hx, params, num_layers, bidirectional)
        if not ours:
            return own(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        found = function(
            input,
            hx,
            params,
            num_layers=num_layers,
            bidirectional=bidirectional,
            dropout=dropout,
            training=train,
            batch_first=batch_first,
        )
        return _result(cell, found)

    return run


def packed(cell: str, own: Callable) -> Callable:
    """``aten::<cell>.data``."""
    function = FUNCTIONS[cell][0]

    def run(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional):
        ours = data.dim() == 2 and len(params) > 1 and batch_sizes.numel() > 0
        if ours:
            steps, batch = batch_sizes.numel(), int(batch_sizes[0])
            ours = _ours(cell, data, steps, batch, hx, params, num_layers, bidirectional)
        if not ours:
            return own(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)
        found = function(
            data,
            hx,
            params,
            batch_sizes=batch_sizes,
            num_layers=num_layers,
            bidirectional=bidirectional,
            dropout=dropout,
            training=train,
        )
        return _result(cell, found)

    return run


def step(cell: str, own: Callable) -> Callable:
    """``aten::<cell>_cell``."""
    function = FUNCTIONS[cell][1]
    op = f"{cell}_cell"

    def run(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        worth = is_worth(op, 1, input.shape[0] if input.dim() == 2 else 1, w_ih, w_hh)
        if not _torchs_own.here.own and (worth or _backend.special):
            states = _states(cell, hx)
            if len(states) == 2 and takes_recurrent(op, worth, (input, *states, w_ih, w_hh, b_ih, b_hh)):
                return function(input, hx, w_ih, w_hh, b_ih, b_hh)
        return own(input, hx, w_ih, w_hh, b_ih, b_hh)

    return run


STAND_INS: dict[str, Callable[[Callable], Callable]] = {
    f"{cell}{form}": partial(build, cell)
    for cell in FUNCTIONS
    for form, build in ((".input", dense), (".data", packed), ("_cell", step))
}
