"""Which backend runs, and why the ones before it did not."""

import inspect
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import seqkern
from seqkern.dispatcher import choice as stand_ins
from seqkern.kernels import rnn, tuning
from seqkern.ops import _attention_backends, _backend, _hardware, _library, _linear_backends, _surroundings
from seqkern.spec.attention import Options, Tensors

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
        ("RNN", (3, 2), torch.float32, True, False, "torch"),
        ("RNN", (4, 2), torch.float32, True, False, "cpu"),
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
    monkeypatch.setattr(_linear_backends, "BF16_TILES", tiles)
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
    monkeypatch.setattr(_hardware, "INTERPRETED", False)
    monkeypatch.setattr(_hardware, "TRITON_MISSING", missing)
    cell = seqkern.nn.GRUCell(3, 4, device=device)
    with seqkern.backend("triton"), pytest.raises(RuntimeError, match=f"cannot serve it: .*{says}"):
        cell(torch.zeros(2, 3, device=device))


def test_triton_is_left_aside_until_a_gpu_has_shown_it_faster(monkeypatch):
    """The order of a GPU's backends, for a tensor that says it is on one."""
    monkeypatch.setattr(_hardware, "TRITON_MISSING", "")
    monkeypatch.setitem(_backend.ORDER, "cpu", _backend.ORDER["cuda"])
    monkeypatch.setattr(_hardware, "INTERPRETED", True)
    call = _backend.Call("gru", (torch.zeros(2, 1, 3), torch.zeros(1, 1, 4)))
    choice = _backend.choose(call)
    assert choice.name == "torch"
    assert "faster than torch's kernel yet" in dict(choice.declined)["triton"]
    with seqkern.backend("triton"):
        assert _backend.choose(call).name == "triton"
    with pytest.raises(RuntimeError, match=r"runs within seqkern\.backend\('triton'\)"):
        _backend.choose(call, "triton")  # alone it would run the kernels of the CPU
    # The way to the whole choice, which a compiler must be able to trace.
    monkeypatch.setattr(_backend, "special", 1)
    gru, x = seqkern.nn.GRU(3, 4), torch.randn(2, 1, 3)
    torch.testing.assert_close(torch.compile(gru, fullgraph=True, backend="aot_eager")(x), gru(x))


@pytest.fixture
def on_hopper(monkeypatch):
    """A GPU that the rules take for a Hopper, whose kernels run every layer in one launch."""
    asked = []

    def in_one_launch(*sizes):
        asked.append(sizes)
        return True

    monkeypatch.setattr(_backend, "_is_hopper", lambda index: True)
    monkeypatch.setattr(_backend, "_unready", lambda: "")
    monkeypatch.setattr(rnn, "in_one_launch", in_one_launch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return asked


def empty(*shape, dtype=torch.bfloat16, grad=False):
    """A tensor without data that says it is on a GPU."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=grad)


def layer_call(op="lstm", dtype=torch.bfloat16, T=64, B=5, H=7, P=0, D=1, packed=False, grad=False):
    G = {"lstm": 4, "gru": 3}.get(op.removesuffix("_cell"), 1)
    lead = () if op.endswith("_cell") else (D,)
    rows = (B,) if op.endswith("_cell") else (T * B,) if packed else (T, B)
    cx = empty(*lead, B, H, dtype=dtype) if op.startswith("lstm") else None
    weights = [empty(G * H, 3, dtype=dtype, grad=grad), empty(G * H, P or H, dtype=dtype, grad=grad)]
    tensors = (empty(*rows, 3, dtype=dtype), empty(*lead, B, P or H, dtype=dtype), cx, *(D * weights))
    return _backend.Call(op, tensors)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, None),
        ({"op": "gru", "packed": True}, None),
        ({"op": "rnn_relu", "D": 2}, None),
        ({"dtype": torch.float16}, "cuDNN is faster in float16"),
        ({"dtype": torch.float32}, "cuDNN is faster in float32"),
        ({"T": 15}, "so few steps"),
        ({"T": 16}, None),
        ({"T": 15, "packed": True}, "so few steps"),
        ({"T": 16, "packed": True}, None),
        ({"T": 63, "grad": True}, "so few steps"),
        ({"T": 64, "grad": True}, None),
        ({"op": "lstm_cell"}, "a single step"),
        ({"op": "gru_cell", "dtype": torch.float32}, "a single step"),
        ({"P": 4}, "one by one"),
    ],
    ids=str,
)
def test_layers_on_hopper(on_hopper, call, says):
    reason = _backend._triton_avoids(layer_call(**call))
    assert reason is None if says is None else says in reason
    sizes = (
        call.get("op", "lstm"),
        torch.bfloat16,
        torch.device("cuda", 0),
        16,
        7,
        call.get("D", 1),
    )  # whole tiles of B
    assert on_hopper == ([sizes] if says is None else [])


def test_a_packed_layer_is_not_captured(on_hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "cannot be captured" in _backend._triton_avoids(layer_call(packed=True))
    assert _backend._triton_avoids(layer_call()) is None


def test_a_layer_that_fits_in_no_launch_on_hopper(on_hopper, monkeypatch):
    monkeypatch.setattr(rnn, "in_one_launch", lambda *sizes: False)
    assert "one by one" in _backend._triton_avoids(layer_call())


def test_other_gpus_and_a_compiler_leave_triton_aside(on_hopper, monkeypatch):
    with monkeypatch.context() as here:
        here.setattr(torch.compiler, "is_compiling", lambda: True)
        assert "torch.compile" in _backend._triton_avoids(layer_call())
    monkeypatch.setattr(_backend, "_is_hopper", lambda index: False)
    assert "no GPU has shown it" in _backend._triton_avoids(layer_call())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "cuDNN's kernel is faster"),
        ({"dtype": torch.float16}, "cuDNN's kernel is faster"),
        ({"causal": True}, "cuDNN's kernel is faster"),
        ({"mask": True}, "cuDNN's kernel is faster"),
        ({"window": (255, 0)}, None),
        ({"window": (-1, 3)}, None),
        ({"bias": True}, None),
        ({"alibi": True, "dtype": torch.float16}, None),
        ({"alibi": True, "grad": "query"}, "but for the gradient of a bias"),
        ({"bias": True, "grad": "query"}, "but for the gradient of a bias"),
        ({"bias": True, "grad": "bias"}, None),
        ({"window": (255, 0), "grad": "query"}, None),
        ({"bias": True, "dropout": 0.1}, "cuDNN's kernel is faster"),
        ({"dtype": torch.float32}, "in float32 it has not been timed"),
        ({"dtype": torch.float32, "window": (255, 0)}, "in float32 it has not been timed"),
        ({"L": 64}, "so small a call"),
        ({"L": 64, "window": (255, 0)}, "so small a call"),
        # What torch's kernel does not know, however small.
        ({"softcap": 30.0}, None),
        ({"softcap": 30.0, "L": 64}, None),
        ({"softcap": 30.0, "dtype": torch.float32}, None),
        ({"lse": True}, None),
    ],
    ids=str,
)
def test_attention_on_hopper(on_hopper, call, says):
    L, dtype = call.get("L", 4096), call.get("dtype", torch.bfloat16)
    grad = call.get("grad")
    q = empty(2, 8, L, 64, dtype=dtype, grad=grad == "query")
    k, v = (empty(2, 8, 4096, 64, dtype=dtype) for _ in range(2))
    left, right = call.get("window", (-1, 0 if call.get("causal") else -1))
    tensors = Tensors(
        q,
        k,
        v,
        mask=empty(1, 1, L, 4096, dtype=torch.bool) if call.get("mask") else None,
        bias=empty(1, 1, L, 4096, dtype=dtype, grad=grad == "bias") if call.get("bias") else None,
        alibi_slopes=empty(8, dtype=torch.float32) if call.get("alibi") else None,
    )
    options = Options(0.125, call.get("softcap", 0.0), call.get("dropout", 0.0), left, right)
    wanted = _attention_backends.Wanted(options, lse=call.get("lse", False))
    reason = _backend._triton_avoids(_backend.Call("attention", tensors, wanted))
    assert reason is None if says is None else says in reason


def test_triton_needs_a_compiler_and_itself(on_hopper, monkeypatch):
    call = layer_call("gru")
    monkeypatch.setattr(_backend, "_unready", lambda: "Triton needs a C compiler")
    assert _backend._triton_avoids(call) == "Triton needs a C compiler"
    monkeypatch.undo()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(_backend.shutil, "which", lambda name: None)
    assert "no gcc and no clang" in _backend._unready.__wrapped__()
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(_backend, "import_module", lambda name: 1 / 0)
    assert "does not work here (ZeroDivisionError" in _backend._unready.__wrapped__()


def test_triton_needs_what_its_launchers_are_compiled_with(monkeypatch):
    """Its driver compiles a helper when it is first asked, as without Python.h it cannot."""

    def no_header():
        raise RuntimeError("Python.h: No such file or directory")

    monkeypatch.setenv("CC", "cc")
    target = SimpleNamespace(active=SimpleNamespace(get_current_target=no_header))
    monkeypatch.setattr(_backend, "import_module", lambda name: SimpleNamespace(driver=target))
    assert "Python.h" in _backend._unready.__wrapped__()


def test_an_amd_gpu_is_no_hopper(monkeypatch):
    """torch gives AMD's architectures numbers that are Hopper's among NVIDIA's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 4))
    for hip, is_hopper in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        _backend._is_hopper.cache_clear()
        assert _backend._is_hopper(0) == is_hopper
        assert tuning.arch_of(torch.device("cuda")) == (94 if is_hopper else 86)
    _backend._is_hopper.cache_clear()


def test_stand_ins_leave_a_gpu_to_torch():
    """The same whether or not somebody watches."""
    call = layer_call("gru")
    with _backend.watch() as seen:
        assert not stand_ins.takes(call)
    assert [made.declined for _, made in seen] == [(("seqkern", stand_ins.ON_GPU),)]


def test_how_large_attention_must_be_on_hopper(on_hopper):
    wanted = _attention_backends.Wanted(Options(0.125, window_left=255, window_right=0))
    rows = int(_attention_backends.GPU_FLOP) // (4 * 1000 * 64)  # over 1000 keys
    for n, small in ((rows - 1, True), (rows, False)):
        tensors = Tensors(empty(1, 1, n, 64), *(empty(1, 1, 1000, 64) for _ in range(2)))
        assert bool(_backend._triton_avoids(_backend.Call("attention", tensors, wanted))) == small


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


def test_a_known_constant_is_none_of_a_graphs_business():
    """Nor need it have been asked before: Dynamo does not trace into it."""

    @_surroundings.known_constant
    def length(cls):
        return len(inspect.getsource(cls))

    def scaled(x):
        return x * length(FakeTensorMode)

    x = torch.ones(2)
    got = torch.compile(scaled, backend="eager", fullgraph=True)(x)
    assert torch.equal(got, scaled(x)) and length.__name__ == "length"
