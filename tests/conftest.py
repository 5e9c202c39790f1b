"""Every way of running the recurrent functions on this machine, as one fixture."""

import pytest
import torch

import seqkern
from seqkern.ops import _library

NATIVE = _library.native()
CPU = [f"cpu-{isa}" for isa in NATIVE.isas()] if NATIVE else []


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


def pytest_collection_modifyitems(config, items):
    """Without compiled kernels their tests are not collected; test_structure says whether they should be there."""
    if NATIVE is not None:
        return
    needing = [i for i in items if i.get_closest_marker("native") or i.get_closest_marker("built")]
    config.hook.pytest_deselected(items=needing)
    items[:] = [i for i in items if i not in needing]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
