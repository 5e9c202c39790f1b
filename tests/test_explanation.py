"""explain: which backend runs where, why the earlier ones declined, and that nothing is left changed."""

import pytest
import torch
from torch import nn

import seqkern


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_forced_backend_is_named(backend):
    model = seqkern.accelerate(nn.Sequential(nn.GRU(3, 4)))
    with seqkern.backend(backend):
        (row,) = seqkern.explain(model, torch.randn(5, 2, 3)).rows
    assert (row.name, row.kind, row.backend) == ("0", "seqkern.nn.GRU", backend)


@pytest.mark.built
def test_kernels_serve_a_model():
    model = seqkern.accelerate(nn.Sequential(nn.LSTM(3, 4, num_layers=2)))
    (row,) = seqkern.explain(model, torch.randn(5, 2, 3)).rows
    assert (row.backend, row.declined) == ("cpu", ())


def test_left_alone_says_why():
    (row,) = seqkern.explain(nn.Sequential(nn.GRU(3, 4)), torch.randn(5, 2, 3)).rows
    assert row.backend == "torch"
    assert "not accelerated yet" in row.declined[0][1]


def test_calls_are_counted():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = seqkern.nn.GRUCell(3, 3)

        def forward(self, x):
            return self.cell(x, self.cell(x))

    (row,) = seqkern.explain(Twice(), torch.randn(2, 3)).rows
    assert (row.name, row.calls) == ("cell", 2)


def test_nothing_is_left_changed():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), seqkern.nn.RNN(3, 4))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.random.get_rng_state()
    seqkern.explain(model, torch.randn(5, 3, generator=torch.Generator()))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_holds_nothing_and_what_cannot_be_called():
    assert "nothing here" in str(seqkern.explain(nn.Linear(3, 4), torch.randn(2, 3)))
    with pytest.raises(TypeError, match="takes a module or a function"):
        seqkern.explain(3)  # type: ignore[arg-type]
