"""The checks at the door of the recurrent functions: torch's exception types, raised before anything is computed.

The happy path compares shapes and leaves; only a mismatch pays for finding the words.
"""

import itertools
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from seqkern.spec import CELLS

_NAMES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}


def check_state_pair(hx, too_few: type[Exception] = IndexError) -> tuple[Tensor | None, Tensor | None]:
    """(h, c) of an LSTM, or two Nones; ``too_few`` is what torch raises for less than two."""
    if hx is None:
        return None, None
    if not isinstance(hx, tuple | list):
        raise TypeError(f"hx is a {type(hx).__name__}, expected a tuple of two tensors (h, c)")
    if len(hx) != 2:
        error = too_few if len(hx) < 2 else RuntimeError
        raise error(f"hx holds {len(hx)} tensors, expected two hidden states (h, c)")
    for label, state in zip("hc", hx):
        if not isinstance(state, Tensor):
            raise AttributeError(
                f"{label} of hx is a {type(state).__name__}, expected a tensor; for zero states pass hx=None"
            )
    return hx[0], hx[1]


def check_tensors(name: str, input: object, hx: object, weights: object) -> None:
    """Each is a tensor of the rank that a weight or bias has; the rest of a check may rely on it."""
    if not isinstance(input, Tensor):
        raise AttributeError(f"{name}: input is a {type(input).__name__}, expected a tensor")
    if hx is not None and not isinstance(hx, Tensor):
        raise AttributeError(f"{name}: hx is a {type(hx).__name__}, expected a tensor or None")
    if not isinstance(weights, Sequence):
        raise TypeError(
            f"{name}: weights is a {type(weights).__name__}, expected a list of tensors such as "
            "list(module.parameters())"
        )
    for at, each in enumerate(weights):
        if not isinstance(each, Tensor):
            raise TypeError(f"{name}: weight {at} is a {type(each).__name__}, expected a tensor")
        if each.dim() not in (1, 2):
            raise RuntimeError(
                f"{name}: weight {at} is {each.dim()}-D {list(each.shape)}, expected 2-D or 1-D"
            )


def check_cell(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> None:
    name, gates = f"{_NAMES[cell]}Cell", CELLS[cell].gates
    check_tensors(name, input, hx, [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None])
    if w_ih.dim() != 2 or w_hh.dim() != 2:
        raise RuntimeError(
            f"{name}: the weights are {_shapes(w_ih, w_hh, b_ih, b_hh)}, expected two matrices before the biases"
        )
    shape, (rows, hidden) = input.shape, w_hh.shape
    state = (shape[0], hidden) if len(shape) == 2 else (hidden,)
    if (
        len(shape) not in (1, 2)
        or w_ih.shape != (rows, shape[-1])
        or rows != gates * hidden
        or (hx is not None and hx.shape != state)
        or (cx is not None and cx.shape != state)
        or (b_ih is not None and b_ih.shape != (rows,))
        or (b_hh is not None and b_hh.shape != (rows,))
    ):
        _refuse_cell(name, gates, input, hx, cx, w_ih, w_hh, b_ih, b_hh)


def _refuse_cell(name, gates, input, hx, cx, w_ih, w_hh, b_ih, b_hh) -> NoReturn:
    if input.dim() not in (1, 2):
        raise ValueError(
            f"{name}: input is {input.dim()}-D {list(input.shape)}, expected "
            "2-D [batch, input_size] or 1-D [input_size]"
        )
    for label, state in (("hx", hx), ("cx", cx)):
        if state is not None and state.dim() not in (1, 2):
            raise ValueError(
                f"{name}: {label} is {state.dim()}-D {list(state.shape)}, expected the rank of input"
            )
    hidden = w_hh.shape[1]
    if input.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(
            f"{name}: input has {input.shape[-1]} features {list(input.shape)}, expected input_size = {w_ih.shape[1]}"
        )
    expected = [*input.shape[:-1], hidden]
    for label, state in (("hx", hx), ("cx", cx)):
        if state is not None and list(state.shape) != expected:
            raise RuntimeError(
                f"{name}: {label} is {list(state.shape)}, expected {expected} (the batch of input, hidden_size)"
            )
    raise RuntimeError(
        f"{name}: the weights are {_shapes(w_ih, w_hh, b_ih, b_hh)}, "
        f"expected [{gates}*H, I], [{gates}*H, H], [{gates}*H], [{gates}*H]"
    )


def check_layers(
    cell: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    num_layers: int,
    directions: int,
    batch_first: bool,
) -> None:
    name = _NAMES[cell]
    check_tensors(name, input, hx, weights)
    sets = num_layers * directions
    per_direction, rest = divmod(len(weights), max(sets, 1))
    if sets < 1 or rest or per_direction not in ((2, 3, 4, 5) if cell == "lstm" else (2, 4)):
        raise RuntimeError(
            f"{name}: weights holds {len(weights)} tensors for {num_layers} layers x {directions} directions, "
            f"expected for each w_ih, w_hh[, b_ih, b_hh]{'[, w_hr]' if cell == 'lstm' else ''}"
        )
    if any(
        w.dim() != (1 if per_direction >= 4 and at % per_direction in (2, 3) else 2)
        for at, w in enumerate(weights)
    ):
        raise RuntimeError(
            f"{name}: the weights are {_shapes(*weights)}, expected matrices w_ih, w_hh[, w_hr] and vectors b_ih, b_hh"
        )
    shape = input.shape
    if batch_sizes is not None:
        if len(shape) != 2:
            raise RuntimeError(
                f"{name}: the data of a packed input is {len(shape)}-D {list(shape)}, expected 2-D [rows, input_size]; "
                "make it with torch.nn.utils.rnn.pack_sequence or pack_padded_sequence"
            )
        steps, batch = _check_batch_sizes(name, batch_sizes, shape[0])
    elif len(shape) == 3:
        batch, steps = shape[:2] if batch_first else (shape[1], shape[0])
    elif len(shape) == 2:
        batch, steps = None, shape[0]
    else:
        raise ValueError(
            f"{name}: input is {len(shape)}-D {list(shape)}, expected 3-D "
            f"{'[batch, time, input_size]' if batch_first else '[time, batch, input_size]'} or 2-D [time, input_size]"
        )
    features, outputs = weights[0].shape[1], weights[1].shape[1]
    gates = CELLS[cell].gates
    hidden = weights[1].shape[0] // gates
    if hx is not None:
        rank = 2 if batch_sizes is None and batch is None else 3
        _check_state(name, "hx", hx, rank, sets, batch, outputs, input, batch_first)
        if cell == "lstm" and cx is None:
            raise RuntimeError(f"{name}: hx holds h but no c, expected both")
    if cx is not None:
        rank = 2 if batch_sizes is None and batch is None else 3
        _check_state(name, "cx", cx, rank, sets, batch, hidden, input, batch_first)
    if shape[-1] != features:
        raise RuntimeError(
            f"{name}: input has {shape[-1]} features {list(shape)}, expected input_size = {features}"
            + ("" if batch_sizes is not None or features not in shape else f"; batch_first is {batch_first}")
        )
    if steps == 0:
        raise RuntimeError(
            f"{name}: input {list(shape)} has no time steps, expected a sequence length larger than 0"
        )
    rows = gates * hidden
    for at in range(0, len(weights), per_direction):
        first = features if at < directions * per_direction else directions * outputs
        own = weights[at : at + per_direction]
        if (
            own[0].shape != (rows, first)
            or own[1].shape != (rows, outputs)
            or (per_direction >= 4 and (own[2].shape != (rows,) or own[3].shape != (rows,)))
            or (own[-1].shape != (outputs, hidden) if per_direction in (3, 5) else outputs != hidden)
        ):
            raise RuntimeError(
                f"{name}: the weights of layer {at // per_direction // directions} are {_shapes(*own)}, expected "
                f"[{rows}, {first}], [{rows}, {outputs}]"
                + (f", [{rows}], [{rows}]" if per_direction >= 4 else "")
                + (f", [{outputs}, {hidden}]" if per_direction in (3, 5) else "")
            )


def _check_state(name, label, state, rank, sets, batch, size, input, batch_first) -> None:
    shape = state.shape
    if len(shape) != rank:
        raise RuntimeError(
            f"{name}: {label} is {len(shape)}-D {list(shape)}, expected {rank}-D for the "
            f"{'unbatched' if rank == 2 else 'batched'} input {list(input.shape)}"
        )
    if shape[0] != sets or shape[-1] != size or (batch is not None and shape[1] != batch):
        expected = [sets, size] if rank == 2 else [sets, "batch" if batch is None else batch, size]
        raise RuntimeError(
            f"{name}: {label} is {list(shape)}, expected {expected} (layers * directions, batch, size of the state) "
            f"for input {list(input.shape)} with batch_first={batch_first}"
        )


def _check_batch_sizes(name: str, batch_sizes: Tensor, rows: int) -> tuple[int, int | None]:
    """Steps and batch of a packed input; the batch is None where its values cannot be read (under a compiler)."""
    remedy = "make it with torch.nn.utils.rnn.pack_sequence or pack_padded_sequence"
    if not isinstance(batch_sizes, Tensor):
        raise TypeError(f"{name}: batch_sizes is a {type(batch_sizes).__name__}, expected a tensor; {remedy}")
    if batch_sizes.dtype != torch.int64:
        error = TypeError if batch_sizes.is_floating_point() else RuntimeError
        raise error(f"{name}: batch_sizes is {batch_sizes.dtype}, expected torch.int64; {remedy}")
    if batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise RuntimeError(
            f"{name}: batch_sizes is {list(batch_sizes.shape)} on {batch_sizes.device}, expected 1-D on the CPU; "
            + remedy
        )
    if batch_sizes.shape[0] == 0:
        raise IndexError(f"{name}: batch_sizes is empty, expected a sequence length larger than 0")
    if torch.compiler.is_compiling():
        return batch_sizes.shape[0], None
    sizes = batch_sizes.tolist()
    if sum(sizes) != rows or sizes[-1] < 1 or any(a < b for a, b in itertools.pairwise(sizes)):
        raise RuntimeError(
            f"{name}: batch_sizes {sizes} does not fit {rows} rows of packed data, "
            f"expected positive sizes that never grow and sum to {rows}; {remedy}"
        )
    return len(sizes), sizes[0]


def check_uniform(op: str, packed: bool, tensors: Sequence[Tensor | None]) -> None:
    """One dtype (unless autocast is on) and one device; tensors are input, h, c and then the weights."""
    input, hx, cx, *weights = tensors
    assert input is not None
    first = weights[0]
    assert first is not None
    name = _NAMES[op.removesuffix("_cell")] + ("Cell" if op.endswith("_cell") else "")
    casts = torch._C._is_any_autocast_enabled()  # type: ignore[attr-defined]
    if input.dtype != first.dtype and not casts:
        # torch's packed LSTM and its cells leave this to the matmul, which raises RuntimeError
        error = RuntimeError if op.endswith("_cell") or (packed and op == "lstm") else ValueError
        or_model = f" or the model with model.to({input.dtype})" if input.is_floating_point() else ""
        raise error(
            f"{name}: input is {input.dtype} and the weights are {first.dtype}, expected one dtype; convert the input "
            f"with input.to({first.dtype}){or_model}"
        )
    if not (input.is_floating_point() or input.is_complex()) or input.dtype.itemsize < 2:
        raise RuntimeError(
            f"{name}: input and weights are {input.dtype}, expected a floating-point dtype of 16 bits or more; "
            "use .float()"
        )
    for label, t in (("hx", hx), ("cx", cx), *(("a weight", w) for w in weights)):
        if t is None:
            continue
        if t.device != input.device:
            raise RuntimeError(
                f"{name}: input is on {input.device} and {label} on {t.device}, expected one device; "
                "move them with .to(device)"
            )
        if t.dtype != input.dtype and not casts and (label != "cx" or not op.endswith("_cell")):
            # of a cell's c torch adds up what it is given, in the wider dtype
            raise RuntimeError(
                f"{name}: input is {input.dtype} and {label} {t.dtype}, expected one dtype; use .to(dtype)"
            )


def _shapes(*tensors: Tensor | None) -> str:
    return ", ".join("None" if t is None else str(list(t.shape)) for t in tensors)
