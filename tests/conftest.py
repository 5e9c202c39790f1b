"""What tests share: which of them can run here, the ways of running the recurrent functions, a fresh compiler."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch

import seqkern
from seqkern.dispatcher import attention as sdpa
from seqkern.dispatcher import choice, fast_paths
from seqkern.functional import _cells, _rnn
from seqkern.ops import _backend, _hardware, _library

# `python -m pytest` puts the root on the path, where transformers would take the folder of Triton kernels for the
# published package of that name.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [each for each in sys.path if Path(each).resolve() != ROOT]

if importlib.util.find_spec("hypothesis") is None:  # then its tests are skipped, not the whole of their files
    stand_in, strategies = ModuleType("hypothesis"), MagicMock()
    stand_in.strategies = strategies
    stand_in.HealthCheck = MagicMock()
    stand_in.given = lambda *_, **__: pytest.mark.skip(reason="hypothesis is not installed")
    stand_in.settings = lambda *_, **__: lambda test: test
    sys.modules |= {"hypothesis": stand_in, "hypothesis.strategies": strategies}

# cuDNN rounds float32 to TF32 unless it is told not to; what is compared with it here is not rounded.
torch.backends.cudnn.allow_tf32 = False

NATIVE = _library.native()
ISAS = NATIVE.isas() if NATIVE else []
CPU = [f"cpu-{isa}" for isa in ISAS]


@pytest.fixture(params=ISAS)
def isa(request):
    """One instruction set for the length of a test."""
    NATIVE.force_isa(request.param)
    yield request.param
    NATIVE.force_isa(None)


@pytest.fixture(params=["reference", "torch", *CPU])
def run_on(request):
    """Forces a backend, and for ``cpu`` one instruction set, for the length of a test."""
    name, _, isa = request.param.partition("-")
    if isa:
        NATIVE.force_isa(isa)
    with seqkern.backend(name):
        yield name
    if isa:
        NATIVE.force_isa(None)


@pytest.fixture
def everything_is_worth_it(monkeypatch):
    """Small shapes stand for large ones."""
    monkeypatch.setattr(choice, "WORTH", dict.fromkeys(choice.WORTH, choice.Worth(0, 0, 0)))
    monkeypatch.setattr(sdpa, "WORTH_A_GRADIENT", 0)
    monkeypatch.setattr(fast_paths, "WORTH_A_LAYER", 0)
    monkeypatch.setattr(_backend, "torch_outruns", lambda op, tensors: None)


def pytest_collection_modifyitems(config, items):
    """What cannot run here is not collected: test_structure says whether compiled kernels should be there, the
    Makefile runs the interpreter's tests in a process of their own and a GPU's where there is one."""
    absent = set()
    if NATIVE is None:
        absent |= {"native", "built"}
    if not _hardware.INTERPRETED:
        absent.add("interpreter")
    if not torch.cuda.is_available():
        absent.add("gpu")
    either = {"gpu", "interpreter"}  # a test marked with both runs in either

    def can_run(item):
        marks = {mark.name for mark in item.iter_markers()}
        return not (marks & absent - either) and (not marks & either or bool(marks & either - absent))

    config.hook.pytest_deselected(items=[i for i in items if not can_run(i)])
    items[:] = [i for i in items if can_run(i)]


@pytest.fixture
def served(monkeypatch):
    """How often an op of the recurrent short ways had a result in a call: ``served("_step", call)``."""
    rooms = {"_step": _cells, "_stack": _rnn}

    def count(name, run) -> int:
        op, seen = getattr(rooms[name], name), []
        with monkeypatch.context() as patched:
            patched.setattr(rooms[name], name, lambda *args: seen.append(op(*args)) or seen[-1])
            run()
        return sum(output is not None for output, *_ in seen)

    return count


@pytest.fixture(params=[None, pytest.param("cpu", marks=pytest.mark.built)])
def as_it_is_or_cpu(request):
    """The choice as it is, and our kernels even where a call this small would go to torch."""
    with seqkern.backend(request.param):
        yield


@pytest.fixture(scope="session")
def transformers_registered():
    """Twice, which is harmless; quiet, because tiny configurations make transformers warn a lot."""
    transformers = pytest.importorskip("transformers")
    from seqkern.integrations.transformers import register

    transformers.utils.logging.set_verbosity_error()
    register()
    register()


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
