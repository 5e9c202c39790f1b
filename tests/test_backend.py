"""Which backend runs, and why the ones before it did not."""

import subprocess
import sys
import threading

import pytest
import torch

import seqkern
from seqkern.ops import _attention_backends, _backend, _library, _linear_backends

NATIVE = _library.native()


def chosen(run):
    with _backend.watch() as seen:
        run()
    return [choice for _, choice in seen]


def test_order_is_cpu_then_torch():
    lstm = seqkern.nn.LSTM(3, 4, num_layers=2)
    (choice,) = chosen(lambda: lstm(torch.zeros(2, 1, 3)))
    if NATIVE:
        assert choice == ("cpu", ())
    else:
        assert choice.name == "torch"
        assert [name for name, _ in choice.declined] == ["cpu"]


@pytest.mark.built
@pytest.mark.parametrize(
    ("run", "name", "says"),
    [
        (torch.no_grad()(lambda m, x: m.bfloat16()(x.bfloat16())), "cpu", None),
        (lambda m, x: m(x), "torch", "gradient"),
        (lambda m, x: torch.func.vmap(m)(x[None]), "reference", "transform"),
        (lambda m, x: torch.func.jvp(m, (x,), (x,)), "reference", "transform"),
        (lambda m, x: m.to("meta")(x.to("meta")), "torch", None),
    ],
)
def test_declines_with_a_reason(run, name, says):
    cell = seqkern.nn.GRUCell(3, 4)
    (choice,) = chosen(lambda: run(cell, torch.zeros(2, 3)))
    assert choice.name == name
    assert says is None or all(says in reason for _, reason in choice.declined)


@pytest.mark.built
def test_a_large_step_keeps_its_gradient():
    cell = seqkern.nn.GRUCell(1200, 1000)
    assert [c.name for c in chosen(lambda: cell(torch.zeros(1, 1200)))] == ["cpu"]


@pytest.mark.built
@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "grad", "tiles", "name"),
    [
        ("RNN", (4, 2), torch.float32, True, False, "torch"),
        ("RNN", (5, 2), torch.float32, True, False, "cpu"),
        ("RNN", (1, 2), torch.float32, False, False, "cpu"),
        ("GRU", (1, 2), torch.float32, True, False, "torch"),
        ("GRU", (2, 2), torch.float32, True, False, "cpu"),
        ("GRU", (3, 2), torch.bfloat16, True, False, "torch"),
        ("GRU", (4, 2), torch.bfloat16, True, False, "cpu"),
        ("LSTM", (1, 2), torch.float32, True, False, "cpu"),
        ("LSTM", (9, 1), torch.bfloat16, False, False, "cpu"),
        ("LSTM", (9, 8), torch.bfloat16, True, False, "cpu"),
        ("LSTM", (9, 1), torch.bfloat16, False, True, "torch"),
        ("LSTM", (9, 7), torch.bfloat16, True, True, "cpu"),
        ("LSTM", (9, 8), torch.bfloat16, True, True, "torch"),
        ("LSTM", (9, 8), torch.float16, False, True, "cpu"),
        ("GRU", (9, 32), torch.bfloat16, False, True, "cpu"),
    ],
)
def test_stands_aside_where_torch_is_faster(kind, shape, dtype, grad, tiles, name, monkeypatch):
    monkeypatch.setattr(_linear_backends, "BF16_DOT", True)
    monkeypatch.setattr(_backend, "BF16_TILES", tiles)
    layer = getattr(seqkern.nn, kind)(3, 4, dtype=dtype).requires_grad_(grad)
    (choice,) = chosen(lambda: layer(torch.zeros(*shape, 3, dtype=dtype)))
    assert choice.name == name
    assert name == "cpu" or "faster on torch's kernel" in choice.declined[0][1]


@pytest.mark.built
def test_declines_autocast():
    cell = seqkern.nn.GRUCell(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (choice,) = chosen(lambda: cell(torch.zeros(2, 3)))
    assert choice.name == "torch" and "autocast" in choice.declined[0][1]


def test_innermost_force_wins():
    cell = seqkern.nn.GRUCell(3, 4).requires_grad_(False)
    x = torch.zeros(2, 3)
    with seqkern.backend("torch"):
        with seqkern.backend("reference"):
            assert chosen(lambda: cell(x))[0].name == "reference"
            weights = list(cell.parameters())
            run = lambda: seqkern.functional.gru_cell(x, None, *weights, backend="torch")  # noqa: E731
            assert chosen(run)[0].name == "torch"
        assert chosen(lambda: cell(x))[0].name == "torch"
        with seqkern.backend(None):
            assert chosen(lambda: cell(x))[0].name == ("cpu" if NATIVE else "torch")
    assert _backend.special == 0


def test_force_ends_with_an_error():
    with pytest.raises(KeyError), seqkern.backend("reference"):
        raise KeyError
    assert _backend.special == 0


def test_force_is_of_one_thread():
    cell = seqkern.nn.GRUCell(3, 4).requires_grad_(False)
    found = []

    def run():
        found.extend(chosen(lambda: cell(torch.zeros(2, 3))))

    with seqkern.backend("reference"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found[0].name == ("cpu" if NATIVE else "torch")


@pytest.mark.parametrize(
    ("device", "missing", "says"),
    [
        ("cpu", "", "a tensor is on cpu"),
        ("meta", "", "on meta"),
        ("cpu", "Triton is not installed; pip", "pip"),
    ],
)
def test_triton_declines_with_a_reason(device, missing, says, monkeypatch):
    monkeypatch.setattr(_backend, "INTERPRETED", False)
    monkeypatch.setattr(_backend, "TRITON_MISSING", missing)
    cell = seqkern.nn.GRUCell(3, 4, device=device)
    with seqkern.backend("triton"), pytest.raises(RuntimeError, match=f"cannot serve it: .*{says}"):
        cell(torch.zeros(2, 3, device=device))


def test_triton_is_left_aside_until_a_gpu_has_shown_it_faster(monkeypatch):
    """The order of a GPU's backends, for a tensor that says it is on one."""
    monkeypatch.setattr(_backend, "TRITON_MISSING", "")
    monkeypatch.setitem(_backend.ORDER, "cpu", _backend.ORDER["cuda"])
    monkeypatch.setattr(_backend, "INTERPRETED", True)
    call = _backend.Call("gru", (torch.zeros(2, 1, 3), torch.zeros(1, 1, 4)))
    choice = _backend.choose(call)
    assert choice.name == "torch"
    assert "faster than torch's kernel yet" in dict(choice.declined)["triton"]
    assert _backend.choose(call, "triton").name == "triton"
    # The way to the whole choice, which a compiler must be able to trace.
    monkeypatch.setattr(_backend, "special", 1)
    gru, x = seqkern.nn.GRU(3, 4), torch.randn(2, 1, 3)
    torch.testing.assert_close(torch.compile(gru, fullgraph=True, backend="aot_eager")(x), gru(x))


@pytest.mark.parametrize(
    ("L", "S", "D", "causal", "small"),
    [
        (64, 64, 64, False, 4 * 64 * 64 * 64),
        (64, 64, 16, False, 4 * 64 * 64 * 16),  # narrow
        (64, 64, 64, True, 4 * 64 * 64 * 64),
        (64, 200, 64, True, 4 * 64 * 200 * 64),  # beyond
        (9, 500, 64, False, 4 * 9 * 500 * 64),  # few
        (1, 500, 64, False, 2 * 500 * 64),  # one
    ],
)
def test_a_small_call_is_torchs(monkeypatch, L, S, D, causal, small):
    """Each bound by itself, at what the call takes and a little above it."""
    query, key = torch.zeros(1, 1, L, D), torch.zeros(1, 1, S, D)
    field = ("beyond" if S > 2 * L else "causal") if causal else "narrow" if D < 32 else "flop"
    field = "one" if L == 1 else "few" if L <= 16 else field
    for bound, wanted in ((small, False), (small + 1, True)):
        bounds = dict.fromkeys(_attention_backends.Small._fields, 0.0 if not causal else 1e9) | {"keys": 2}
        set_to = _attention_backends.Small(**bounds | {field: bound})
        monkeypatch.setattr(_attention_backends, "SMALL_FLOAT32", set_to)
        assert _attention_backends.too_small(query, key, key, causal) == wanted
    bounds = dict.fromkeys(_attention_backends.Small._fields, 0.0) | {"keys": 2}
    monkeypatch.setattr(_attention_backends, "SMALL_FLOAT32", _attention_backends.Small(**bounds))
    assert _attention_backends.too_small(query, key[:, :, :1], key[:, :, :1], causal)
    assert not _attention_backends.too_small(query, key, key, causal)


def test_package_is_light_and_works_without_its_binary():
    code = (
        "import sys; sys.modules['seqkern._native'] = None; sys.modules['triton'] = None\n"
        "import torch, seqkern\n"
        "assert not any(n.startswith('seqkern.') and n != 'seqkern._version' for n in sys.modules if sys.modules[n])\n"
        "out, _ = seqkern.nn.LSTM(3, 4)(torch.zeros(2, 1, 3))\n"
        "from seqkern.ops import _library\n"
        "print(_library.why_missing())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "could not be loaded" in done.stdout or "without its compiled kernels" in done.stdout
