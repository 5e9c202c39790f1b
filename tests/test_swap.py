"""accelerate, restore, swaps: what is swapped, what is left alone and why, and that nothing else changes."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqkern
from seqkern.testing import relative_rms, tolerance

LAYERS = {
    "rnn": lambda: nn.RNN(3, 4, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "rnn cell": lambda: nn.RNNCell(3, 4),
    "lstm cell": lambda: nn.LSTMCell(3, 4),
    "gru cell": lambda: nn.GRUCell(3, 4, bias=False),
}


class OwnForward(nn.LSTM):
    def forward(self, input, hx=None):
        output, state = super().forward(input, hx)
        return output + 1, state


class OwnName(nn.GRU):
    pass


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized():
    layer = nn.GRU(3, 4)
    parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    return layer


def patched():
    layer = nn.GRU(3, 4)
    layer.forward = lambda *args: nn.GRU.forward(layer, *args)
    return layer


LEFT_ALONE = {
    "own forward": (lambda: OwnForward(3, 4), "with its own forward"),
    "own name": (lambda: OwnName(3, 4), "whose class would be lost"),
    "parametrized": (parametrized, "parametrized"),
    "patched": (patched, "replaced on the instance"),
    "ours": (lambda: seqkern.nn.GRU(3, 4), "already a seqkern module"),
    "scripted": (lambda: torch.jit.script(nn.GRUCell(3, 4)), "scripted or traced"),
    "traced": (lambda: torch.jit.trace(nn.GRUCell(3, 4), torch.zeros(2, 3)), "scripted or traced"),
}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for each in value for t in tensors(each)]


def input_of(layer):
    return torch.randn(2, 3) if isinstance(layer, nn.RNNCellBase) else torch.randn(5, 2, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_swap_changes_the_class_and_nothing_else(name):
    layer = LAYERS[name]().eval()
    before, state = dict(layer.named_parameters()), layer.state_dict()
    theirs, x = type(layer), input_of(layer)
    wide = tensors(copy.deepcopy(layer).double()(x.double()))
    want = tensors(layer(x))
    assert seqkern.accelerate(layer) is layer
    assert type(layer) is getattr(seqkern.nn, theirs.__name__)
    assert not layer.training
    assert all(p is before[key] for key, p in layer.named_parameters())
    assert list(layer.state_dict()) == list(state)
    for got, torchs, exact in zip(tensors(layer(x)), want, wide, strict=True):
        assert relative_rms(got, exact) <= tolerance(got.dtype, relative_rms(torchs, exact), layers=2)
    once = seqkern.swaps(layer)
    assert seqkern.swaps(seqkern.accelerate(layer)) == once
    assert once[0].after == f"seqkern.nn.{theirs.__name__}"
    assert type(seqkern.restore(layer)) is theirs
    assert all(torch.equal(a, b) for a, b in zip(tensors(layer(x)), want, strict=True))
    assert seqkern.swaps(layer)[0].after is None


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone_and_said_why(name):
    build, why = LEFT_ALONE[name]
    layer = build()
    model = nn.Sequential(layer, nn.GRU(4, 4))
    cell = isinstance(layer, torch.jit.ScriptModule)
    kept, x = type(layer), torch.randn((2, 3) if cell else (2, 1, 3))
    want = tensors(layer(x))
    seqkern.accelerate(model)
    rows = {row.name: row for row in seqkern.swaps(model)}
    assert type(model[0]) is kept
    assert rows["0"].after is None
    assert why in rows["0"].reason
    assert rows["1"].after == "seqkern.nn.GRU"
    assert all(torch.equal(a, b) for a, b in zip(tensors(model[0](x)), want, strict=True))
    seqkern.restore(model)
    assert (type(model[0]), type(model[1])) == (kept, nn.GRU)


def test_optimizer_and_hooks_stay():
    layer, calls = nn.LSTM(3, 4), []
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer.register_forward_hook(lambda *_: calls.append("hook"))
    before = [p.detach().clone() for p in layer.parameters()]
    seqkern.accelerate(layer)(torch.randn(5, 2, 3))[0].sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert not any(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_nested_wrapped_and_shared_modules():
    shared = nn.GRU(4, 4)
    model = nn.DataParallel(nn.ModuleDict({"a": nn.Sequential(shared), "b": shared, "c": nn.LSTM(4, 4)}))
    seqkern.accelerate(model)
    assert [row.name for row in seqkern.swaps(model)] == ["module.a.0", "module.c"]
    assert model.module["a"][0] is model.module["b"]
    assert type(model.module["b"]) is seqkern.nn.GRU
    assert type(seqkern.restore(model).module["b"]) is nn.GRU


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "pickle"])
def test_a_copy_runs_and_can_be_restored(copied):
    model = seqkern.accelerate(nn.Sequential(nn.GRU(3, 4)))
    x = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    twin = copied(model)
    assert all(torch.equal(a, b) for a, b in zip(tensors(twin(x)[0]), tensors(model(x)[0]), strict=True))
    assert type(seqkern.restore(twin)[0]) is nn.GRU
    assert type(model[0]) is seqkern.nn.GRU


@pytest.mark.parametrize("verb", [seqkern.accelerate, seqkern.restore, seqkern.swaps])
@pytest.mark.parametrize("given", [None, nn.LSTM, lambda x: x], ids=["none", "class", "function"])
def test_no_module(verb, given):
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module"):
        verb(given)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("LSTM", "forward"),
        ("GRU", "forward"),
        ("LSTMCell", "forward"),
        ("MultiheadAttention", "forward"),
        ("TransformerEncoderLayer", "_ff_block"),
        ("TransformerDecoderLayer", "_mha_block"),
        ("GRUCell", "__call__"),
    ],
)
def test_a_class_that_somebody_patched_is_left_alone(monkeypatch, name, method):
    sizes = (4, 2) if name[0] in "TM" else (4, 4)
    before, after = (getattr(nn, name)(*sizes) for _ in range(2))
    seqkern.accelerate(before)
    monkeypatch.setattr(getattr(nn, name), method, lambda *_: torch.zeros(1))
    seqkern.accelerate(after)
    row = seqkern.swaps(after)[0]
    assert row.after is None and row.reason == f"torch.nn.{name}.{method} was replaced on the class"
    assert seqkern.swaps(before)[0].after == f"seqkern.nn.{name}"
    monkeypatch.undo()
    assert seqkern.swaps(seqkern.accelerate(after))[0].after == f"seqkern.nn.{name}"


class Sharded:
    """What fully_shard mixes into the class of a module."""

    def shards(self):
        return 1


@pytest.mark.parametrize("name", ["LSTM", "TransformerEncoderLayer"])
def test_a_class_mixed_in_after_the_swap_stays(name):
    model = nn.Sequential(nn.LSTM(4, 4) if name == "LSTM" else nn.TransformerEncoderLayer(4, 2))
    layer = seqkern.accelerate(model)[0]
    layer.__class__ = type(f"Sharded{name}", (Sharded, type(layer)), {})
    assert next(row.after for row in seqkern.swaps(model)) == f"seqkern.nn.{name}"
    seqkern.restore(model)
    assert isinstance(layer, getattr(nn, name)) and not isinstance(layer, getattr(seqkern.nn, name))
    assert layer.shards() == 1 and type(layer).__name__ == f"Sharded{name}"
    assert all("seqkern" not in type(each).__module__ for each in model.modules())
    assert all(row.after is None for row in seqkern.swaps(model))


class Written(seqkern.nn.LSTM):
    """A class that can be imported."""


def twice():
    return type("Twice", (type("Once", (seqkern.nn.LSTM,), {}),), {})


def calls_super():
    class Local(Sharded, seqkern.nn.LSTM):
        def forward(self, *args):
            return super().forward(*args)

    return Local


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (twice, r"Twice derives from seqkern\.nn\.LSTM by way of others"),
        (lambda: Written, "Written is written in"),
        (calls_super, r"Local has methods that call super\(\)"),
    ],
)
def test_a_class_that_cannot_be_made_anew_is_said_before_anything_is_undone(make, says):
    model = seqkern.accelerate(nn.Sequential(nn.GRU(4, 4), nn.LSTM(4, 4)))
    model[1].__class__ = make()
    with pytest.raises(TypeError, match=says):
        seqkern.restore(model)
    assert type(model[0]) is seqkern.nn.GRU
    model[1](torch.randn(3, 2, 4))


@pytest.mark.parametrize("kind", [lambda: nn.LSTM(3, 4), lambda: nn.Linear(3, 4)])
def test_a_forward_that_was_replaced_since_is_not_left_behind(kind):
    """As by accelerate's hooks: it would call ours on a module of torch's."""
    model = nn.Sequential(nn.GRU(3, 3), kind())
    seqkern.accelerate(model)
    before = model[1].forward
    model[1].forward = lambda *args: before(*args)
    with pytest.raises(TypeError, match=r"forward of a seqkern\.nn\.\w+ was replaced"):
        seqkern.restore(model)
    assert type(model[0]) is seqkern.nn.GRU  # nothing was undone
    del model[1].forward
    assert type(seqkern.restore(model)[0]) is nn.GRU


def test_a_forward_that_was_put_back_is_the_class_s():
    """As accelerate's hooks leave it when they are removed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))

    def put_back():
        for module in model:
            module.forward = module.forward

    put_back()
    assert all(row.after for row in seqkern.swaps(seqkern.accelerate(model)))
    x = torch.randn(3, 2, 4)
    want = [model[1](x)[0], model[2](x)]
    put_back()
    torch.testing.assert_close([model[1](x)[0], model[2](x)], want)
    seqkern.restore(model)
    assert [type(module) for module in model] == [nn.Linear, nn.LSTM, nn.TransformerEncoderLayer]
    torch.testing.assert_close(model[1](x)[0], want[0])
    for another in (lambda *args: "another", model[1].__sizeof__):
        model[1].forward = another
        assert "replaced on the instance" in seqkern.swaps(seqkern.accelerate(model))[1].reason
