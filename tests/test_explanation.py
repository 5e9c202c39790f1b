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
    assert "nothing here" in str(seqkern.explain(nn.LayerNorm(3), torch.randn(2, 3)))
    with pytest.raises(TypeError, match="takes a module or a function"):
        seqkern.explain(3)  # type: ignore[arg-type]


class Answers(nn.Module):
    """A model whose forward generates."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, prompt, memory):
        options = {"embed": lambda tokens, _: self.words(tokens), "logits": lambda x: x @ self.words.weight.T}
        return self.decoder.generate(prompt, memory, max_new_tokens=3, **options).tokens


def test_a_model_that_generates_within_its_forward():
    model = seqkern.accelerate(Answers().eval())
    rows = seqkern.explain(model, torch.tensor([[1, 2]]), torch.randn(1, 5, 8)).rows
    assert {row.name for row in rows} == {"decoder.layers.0", "decoder.layers.1"}
    assert {row.kind for row in rows} == {"seqkern.nn.TransformerDecoderLayer"}
    assert "step" not in vars(model.decoder.layers[0])


def test_an_error_leaves_no_hook_behind():
    with pytest.raises(ValueError, match="memory"):
        seqkern.explain(seqkern.accelerate(Answers().eval()), torch.tensor([[1, 2]]), None)
    hooks = torch.nn.modules.module
    assert not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


@pytest.mark.built
@pytest.mark.parametrize("swapped", [False, True])
def test_what_is_compiled_and_what_is_written_on_seqkern_is_not_said_to_be_torchs(swapped):
    class Own(seqkern.nn.TransformerEncoderLayer):
        pass

    layer = seqkern.accelerate(nn.LSTM(8, 8)) if swapped else seqkern.nn.LSTM(8, 8)
    model = nn.Sequential(torch.compile(layer, backend="eager", fullgraph=True))
    x = torch.randn(5, 2, 8)
    model(x)
    assert [row.backend for row in seqkern.explain(model, x).rows] == ["cpu"]
    rows = seqkern.explain(Own(8, 2, 16, dropout=0.0), x).rows
    assert [(row.name, row.backend) for row in rows] == [("self_attn", "cpu")]
