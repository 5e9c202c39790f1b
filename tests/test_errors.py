"""Mistakes at the door: torch's exception type, a message that names what came, and nothing touched."""

import subprocess
import sys

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkern
from seqkern.ops._backend import BACKENDS

I, H, B, T = 4, 6, 3, 5  # sizes all different, so that a message names one of them


def state(kind, *shape, dtype=torch.float32, device="cpu"):
    one = torch.zeros(*shape, dtype=dtype, device=device)
    return (one, one.clone()) if kind.startswith("LSTM") else one


def x(*lead, features=I, **options):
    return torch.zeros(*lead, features, **options)


def packed(data=None, sizes=(2, 1), dtype=torch.int64):
    return PackedSequence(x(3) if data is None else data, torch.tensor(sizes, dtype=dtype))


# what is wrong -> (input, hx) of a kind, and what the message must say
LAYERS = {
    "rank 1": (lambda k: (x(), None), "1-D"),
    "rank 4": (lambda k: (x(1, T, B), None), "4-D"),
    "features": (lambda k: (x(T, B, features=3), None), r"3 features \[5, 3, 3\].*input_size = 4"),
    "float64 input": (lambda k: (x(T, B, dtype=torch.float64), None), r"torch\.float64.*torch\.float32"),
    "integer input": (lambda k: (x(T, B).long(), None), r"torch\.int64.*torch\.float32"),
    "state batch": (lambda k: (x(T, B), state(k, 1, 2, H)), r"hx is \[1, 2, 6\], expected \[1, 3, 6\]"),
    "state layers": (lambda k: (x(T, B), state(k, 2, B, H)), r"hx is \[2, 3, 6\], expected \[1, 3, 6\]"),
    "state size": (lambda k: (x(T, B), state(k, 1, B, 7)), r"hx is \[1, 3, 7\], expected \[1, 3, 6\]"),
    "state rank": (lambda k: (x(T, B), state(k, B, H)), "hx is 2-D.*expected 3-D"),
    "state rank, unbatched": (lambda k: (x(T), state(k, 1, B, H)), "hx is 3-D.*expected 2-D"),
    "state dtype": (lambda k: (x(T, B), state(k, 1, B, H, dtype=torch.float64)), r"hx torch\.float64"),
    "state device": (lambda k: (x(T, B), state(k, 1, B, H, device="meta")), "on cpu and hx on meta"),
    "input device": (lambda k: (x(T, B, device="meta"), None), "on meta and a weight on cpu"),
    "no time steps": (lambda k: (x(0, B), None), "no time steps"),
    "no time steps, unbatched": (lambda k: (x(0), None), "no time steps"),
    "packed features": (lambda k: (packed(x(3, features=3)), None), r"3 features.*input_size = 4"),
    "packed dtype": (lambda k: (packed(x(3, dtype=torch.float64)), None), r"torch\.float64.*torch\.float32"),
    "packed rank": (lambda k: (packed(x(1, 3)), None), "3-D.*pack_sequence"),
    "packed sizes sum": (lambda k: (packed(sizes=(2, 2)), None), r"\[2, 2\] does not fit 3 rows"),
    "packed sizes grow": (lambda k: (packed(sizes=(1, 2)), None), r"\[1, 2\] does not fit 3 rows"),
    "packed sizes empty": (lambda k: (packed(x(0), ()), None), "batch_sizes is empty"),
    "packed sizes float": (
        lambda k: (packed(sizes=(2.0, 1.0), dtype=torch.float32), None),
        r"torch\.float32",
    ),
    "packed sizes int32": (lambda k: (packed(dtype=torch.int32), None), r"torch\.int32"),
    "packed state dtype": (
        lambda k: (packed(), state(k, 1, 2, H, dtype=torch.float64)),
        r"hx torch\.float64",
    ),
    "packed state batch": (
        lambda k: (packed(), state(k, 1, 3, H)),
        r"hx is \[1, 3, 6\], expected \[1, 2, 6\]",
    ),
    "unsorted state batch": (
        lambda k: (pack_padded_sequence(x(T, B), [2, 5, 3], enforce_sorted=False), state(k, 1, 2, H)),
        r"hx is \[1, 2, 6\], expected \[1, 3, 6\]",
    ),
}
CELLS = {
    "rank 3": (lambda k: (x(1, B), None), "3-D"),
    "rank 0": (lambda k: (torch.zeros(()), None), "0-D"),
    "features": (lambda k: (x(B, features=3), None), "3 features.*input_size = 4"),
    "features, unbatched": (lambda k: (x(features=3), None), "3 features.*input_size = 4"),
    "float64 input": (lambda k: (x(B, dtype=torch.float64), None), r"torch\.float64.*torch\.float32"),
    "integer input": (lambda k: (x(B).long(), None), r"torch\.int64.*torch\.float32"),
    "state batch": (lambda k: (x(B), state(k, 2, H)), r"hx is \[2, 6\], expected \[3, 6\]"),
    "state size": (lambda k: (x(B), state(k, B, 5)), r"hx is \[3, 5\], expected \[3, 6\]"),
    "state 1-D": (lambda k: (x(B), state(k, H)), r"hx is \[6\], expected \[3, 6\]"),
    "state 2-D, unbatched": (lambda k: (x(), state(k, 1, H)), r"hx is \[1, 6\], expected \[6\]"),
    "state rank": (lambda k: (x(B), state(k, 1, B, H)), "hx is 3-D"),
    "state dtype": (lambda k: (x(B), state(k, B, H, dtype=torch.float64)), r"hx torch\.float64"),
    "state device": (lambda k: (x(B), state(k, B, H, device="meta")), "on cpu and hx on meta"),
    "input device": (lambda k: (x(B, device="meta"), None), "on meta and a"),
}


def check(kind, build, says):
    theirs, ours = getattr(torch.nn, kind)(I, H), getattr(seqkern.nn, kind)(I, H)
    before = {name: p.clone() for name, p in ours.named_parameters()}
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as want:
        theirs(*build(kind))
    with pytest.raises(want.type, match=f"{kind}: .*{says}") as got:
        ours(*build(kind))
    assert got.type is want.type
    assert all(torch.equal(before[name], p) for name, p in ours.named_parameters())


@pytest.mark.parametrize("what", LAYERS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_layers(run_on, kind, what):
    check(kind, *LAYERS[what])


@pytest.mark.parametrize("what", CELLS)
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(run_on, kind, what):
    check(kind, *CELLS[what])


def test_batch_first_is_named_where_it_explains_the_mistake():
    with pytest.raises(RuntimeError, match=r"batch_first is False"):
        seqkern.nn.GRU(I, H)(torch.zeros(B, I, T))
    with pytest.raises(RuntimeError, match=r"hx is \[1, 3, 6\], expected \[1, 5, 6\].*batch_first=False"):
        seqkern.nn.GRU(I, H)(torch.zeros(B, T, I), torch.zeros(1, B, H))


def test_lstm_states_come_in_two():
    for module, lead in ((seqkern.nn.LSTM(I, H), (T, B)), (seqkern.nn.LSTMCell(I, H), (B,))):
        with pytest.raises(TypeError, match="expected a tuple of two tensors"):
            module(x(*lead), torch.zeros(1, B, H))
        with pytest.raises(RuntimeError, match="holds 3 tensors, expected two"):
            module(x(*lead), (torch.zeros(1, B, H),) * 3)
    with pytest.raises(RuntimeError, match=r"cx is \[1, 3, 5\], expected \[1, 3, 6\]"):
        seqkern.nn.LSTM(I, H)(x(T, B), (torch.zeros(1, B, H), torch.zeros(1, B, 5)))
    with pytest.raises(RuntimeError, match=r"cx is \[3, 5\], expected \[3, 6\]"):
        seqkern.nn.LSTMCell(I, H)(x(B), (torch.zeros(B, H), torch.zeros(B, 5)))


@pytest.mark.parametrize("pick", [lambda h: (None, h), lambda h: (h, None), lambda h: (h,), lambda h: ()])
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_half_a_state_as_torch(kind, pick):
    lead = (T, B) if kind == "LSTM" else (B,)
    hx = pick(torch.zeros((1, B, H) if kind == "LSTM" else (B, H)))
    with pytest.raises((AttributeError, IndexError, TypeError, RuntimeError)) as theirs:
        getattr(torch.nn, kind)(I, H)(x(*lead), hx)
    with pytest.raises(theirs.type, match="hx"):
        getattr(seqkern.nn, kind)(I, H)(x(*lead), hx)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("input", [None, [1.0], 3])
def test_input_that_is_no_tensor_as_torch(kind, input):
    with pytest.raises((AttributeError, TypeError)) as theirs:
        getattr(torch.nn, kind)(I, H)(input)
    with pytest.raises(theirs.type, match=f"input is a {type(input).__name__}"):
        getattr(seqkern.nn, kind)(I, H)(input)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: None, "weights is a NoneType"),
        (lambda w: iter(w), "weights is a .*iterator"),
        (lambda w: [w[0], None, *w[2:]], "weight 1 is a NoneType"),
        (lambda w: [each.flatten() for each in w], r"the weights are \[96\]"),
        (lambda w: [w[0][None], *w[1:]], "weight 0 is 3-D"),
    ],
)
def test_weights_that_are_none(change, says):
    weights = list(torch.nn.LSTM(I, H).parameters())
    with pytest.raises((TypeError, RuntimeError), match=says):
        seqkern.functional.lstm(x(T, B), None, change(weights))


def test_numbers_that_are_not_floating():
    weights = [w.detach().long() for w in torch.nn.GRU(I, H).parameters()]
    with pytest.raises(RuntimeError, match=r"input and weights are torch\.int64"):
        seqkern.functional.gru(x(T, B).long(), None, weights)


def test_weights_of_the_wrong_number_or_shape():
    weights = list(torch.nn.LSTM(I, H, num_layers=2).parameters())
    lstm = seqkern.functional.lstm
    with pytest.raises(RuntimeError, match="holds 7 tensors for 2 layers x 1 directions"):
        lstm(x(T, B), None, weights[:-1], num_layers=2)
    with pytest.raises(RuntimeError, match=r"layer 1 are \[24, 6\], \[24, 6\], \[24\], \[6\]"):
        lstm(x(T, B), None, [*weights[:-1], torch.zeros(6)], num_layers=2)
    with pytest.raises(RuntimeError, match=r"the weights are \[24, 4\], \[24, 6\], \[24\], \[7\]"):
        seqkern.functional.lstm_cell(x(B), None, weights[0], weights[1], torch.zeros(24), torch.zeros(7))
    with pytest.raises(ValueError, match="'tanh' or 'relu'"):
        seqkern.functional.rnn(x(T, B), None, weights, nonlinearity="elu")


@pytest.mark.parametrize(
    ("name", "says"), [("triton", "a tensor is on cpu|not installed"), ("cuda", "no cuda kernel")]
)
def test_forced_backend_that_cannot_serve(name, says):
    lstm = seqkern.nn.LSTM(I, H)
    with (
        seqkern.backend(name),
        pytest.raises(RuntimeError, match=f"'{name}' was forced for lstm.*({says})"),
    ):
        lstm(x(T, B))
    cell = torch.nn.GRUCell(I, H)
    with pytest.raises(RuntimeError, match="was forced for gru_cell"):
        seqkern.functional.gru_cell(x(B), None, *cell.parameters(), backend=name)


def test_forced_cpu_says_why_it_cannot_serve():
    lstm = seqkern.nn.LSTM(I, H, device="meta")
    with seqkern.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced for lstm"):
        lstm(x(T, B, device="meta"))


def test_unknown_backend_lists_the_known():
    with (
        pytest.raises(ValueError, match=f"'cpuu', expected one of {', '.join(BACKENDS)}"),
        seqkern.backend("cpuu"),
    ):
        pass
    with pytest.raises(ValueError, match="expected one of"):
        seqkern.functional.gru(x(T, B), None, list(torch.nn.GRU(I, H).parameters()), backend="tritn")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "tritn",
            "ValueError: the environment variable SEQKERN_BACKEND is 'tritn', expected one of reference,",
        ),
        ("cuda", "RuntimeError: backend 'cuda' was forced for gru but cannot serve it"),
        ("reference", "served"),
    ],
)
def test_environment_variable(name, says, monkeypatch):
    monkeypatch.setenv("SEQKERN_BACKEND", name)
    code = "import torch, seqkern; seqkern.nn.GRU(3, 4)(torch.zeros(2, 1, 3)); print('served')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert says in done.stdout + done.stderr


TOO_LITTLE = """
import resource, torch, seqkern
layer, x = seqkern.nn.LSTM(64, 3000), torch.randn(500, 100, 64)
q = torch.randn(1, 1, 20000, 256)
small = seqkern.nn.LSTM(4, 8), torch.randn(3, 2, 4)
want = small[0](small[1])[0]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), -1))
for call in (lambda: layer(x), lambda: seqkern.functional.attention(q, q, q, return_weights="mean")):
    try:
        with torch.no_grad():
            call()
    except RuntimeError as error:
        assert "DefaultCPUAllocator: can't allocate memory" in str(error), error
    else:
        raise AssertionError("there was enough")
assert torch.equal(small[0](small[1])[0], want)
"""


@pytest.mark.built
@pytest.mark.skipif(sys.platform != "linux", reason="how much a process may use is Linux's to bound")
def test_too_little_memory_is_said_as_torch_says_it():
    run = subprocess.run([sys.executable, "-c", TOO_LITTLE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
