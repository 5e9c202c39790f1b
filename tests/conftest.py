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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
