"""The persistent recurrent kernels against a float64 oracle.

In the interpreter, which runs one program after another, those calls alone whose programs wait for nobody: the others
need a GPU.
"""

import pytest
import torch

import seqkern
from seqkern.kernels import persistent, rnn, tuning, tuning_cache
from seqkern.ops import _hardware
from seqkern.testing import Case, check_drawn, make_case, run_op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore:RNN module weights are not part of single contiguous chunk"
    ),  # cuDNN's
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    ),  # Triton's
]

DEVICE = "cpu" if _hardware.INTERPRETED else "cuda"
CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
FORMS = [("dense", False), ("dense", True), ("packed", False), ("packed", True)]
FORWARD, BACKWARD = persistent.persistent_forward, persistent.persistent_backward
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="its programs wait for one another")


@pytest.fixture(autouse=True)
def ran(monkeypatch):
    """Forces the kernels; the ones that were launched."""
    found = []
    launch = rnn.launch

    def note(kernel, *args, **options):
        found.append(kernel)
        launch(kernel, *args, **options)

    monkeypatch.setattr(rnn, "launch", note)
    monkeypatch.setattr(tuning_cache, "measured", dict)
    with seqkern.backend("triton"), tuning_cache.forced({}, persistent=True):
        yield found


def make(*args, **options):
    case = make_case(*args, **options)

    def move(t):
        return t.to(DEVICE) if t is not None and t.is_floating_point() else t

    return Case(case.cell, tuple(map(move, case.tensors)), tuple(map(move, case.grads)))


def check(cell, form, dtype, **options):
    def draw(n):
        return [make(cell, form, dtype, **options, seed=n)]

    check_drawn(cell, draw, f"{cell} {form} {options}")


@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_one_program(ran, cell, form, bidirectional):
    check(cell, form, torch.float16, T=4, B=19, I=5, H=13, bidirectional=bidirectional)
    assert FORWARD in ran
    assert (BACKWARD in ran) == (DEVICE == "cuda" or cell.startswith("rnn"))


@pytest.mark.parametrize("cell", CELLS)
def test_without_bias(ran, cell):
    check(cell, "packed", torch.float16, T=3, B=2, I=5, H=16, bias=False)
    assert FORWARD in ran


@on_gpu
@pytest.mark.parametrize(("form", "bidirectional"), FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_many_programs(ran, cell, form, bidirectional, dtype):
    check(cell, form, dtype, T=9, B=19, I=40, H=330, bidirectional=bidirectional)
    assert FORWARD in ran and BACKWARD in ran


@on_gpu
@pytest.mark.parametrize("cell", CELLS)
def test_full_grid_gives_the_same_bits_twice(ran, cell):
    """As many programs as run at once, long enough that one that did not wait would show."""
    case = make(cell, "dense", torch.bfloat16, T=200, B=32, I=64, H=1024)
    first = run_op(case)
    assert FORWARD in ran and BACKWARD in ran
    for _ in range(5):
        again = run_op(case)
        assert [name for name in first if not torch.equal(first[name], again[name])] == []
    with tuning_cache.forced({}, steps=True):
        by_steps = run_op(case)
    off = {
        n: float((first[n].float() - by_steps[n].float()).norm() / by_steps[n].float().norm()) for n in first
    }
    assert max(off.values()) < 0.05, off


def problem(kernel="persistent_forward", dtype=torch.bfloat16, B=16, H=768, D=1, projects=False, G=4):
    return tuning.Problem(kernel, "lstm", G, 5, True, dtype, True, B, H, H, D, projects)


def test_rules():
    with tuning_cache.forced({}):
        assert tuning.persistent_config(90, 132, problem()) == (16, 16, 64, 4, 1)
        assert tuning.persistent_config(90, 132, problem(B=64, H=1024)).BLOCK_B == 32
        assert tuning.persistent_config(90, 132, problem(B=32, H=1024, D=2)).BLOCK_B == 32
        assert tuning.persistent_config(90, 132, problem(B=64, H=1024, D=2)) is None
        assert tuning.persistent_config(90, 132, problem(G=1)).BLOCK_H == 64
        # More programs than run at once; weights that do not fit; what the kernels do not do; what nobody has run.
        assert tuning.persistent_config(90, 100, problem(B=64, H=1024)) is None
        assert tuning.persistent_config(90, 132, problem(B=128, H=1024)) is None
        assert tuning.persistent_config(90, 132, problem(H=2048)) is None
        assert tuning.persistent_config(90, 132, problem(projects=True)) is None
        assert tuning.persistent_config(90, 132, problem(dtype=torch.float32)) is None
        assert tuning.persistent_config(80, 108, problem()) is None
