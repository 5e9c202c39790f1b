"""verify: passes where the kernels are right, raises where one is wrong, and says what it changed."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import seqkern
from seqkern import functional


class Tagger(nn.Module):
    """Integers in, dropout of three kinds, a keyword with a default."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.layers = nn.LSTM(3, 4, num_layers=2, dropout=0.5)
        self.drop = nn.Dropout(0.3)

    def forward(self, numbers, scale=1.0):
        output, _ = self.layers(self.embedding(numbers))
        return {"scores": nn.functional.dropout(self.drop(output) * scale, 0.2, self.training)}


def test_dropout_is_set_to_zero_and_said_so():
    model = Tagger()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    result = seqkern.verify(model, torch.randint(7, (5, 2)))
    assert result.ok
    assert any("layers (0.5)" in each for each in result.dropout)
    assert any("drop (0.3)" in each for each in result.dropout)
    assert len(result.dropout) == 3
    assert "dropout was set to 0" in str(result)
    assert model.layers.dropout == 0.5
    assert type(model.layers) is nn.LSTM
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert "d embedding.weight" in {row.name for row in result.rows}


def test_packed_input():
    packed = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)])
    result = seqkern.verify(nn.GRU(3, 4, bidirectional=True), packed)
    assert result.ok
    assert {"output[0].data", "output[1]"} <= {row.name for row in result.rows}


def test_nothing_accelerated_is_said():
    assert "nothing was accelerated" in str(seqkern.verify(nn.LayerNorm(3), torch.randn(2, 3)))


def test_a_wrong_kernel_raises(monkeypatch):
    right = functional.gru

    def wrong(*args, **kwargs):
        output, state = right(*args, **kwargs)
        return output * 1.001, state

    monkeypatch.setattr(functional, "gru", wrong)
    with pytest.raises(seqkern.VerificationError, match=r"less accurate .* worst") as caught:
        seqkern.verify(nn.GRU(3, 4), torch.randn(5, 2, 3))
    assert not caught.value.result.ok
    assert "TOO LARGE" in str(caught.value.result)


def test_no_floating_output():
    with pytest.raises(ValueError, match="returned none"):
        seqkern.verify(nn.Flatten(), torch.zeros(2, 3, dtype=torch.int64))


def test_outputs_of_nan_are_no_success():
    """Nothing that is NaN in torch can be compared, and a model that gives nothing else was not verified."""
    model = nn.LSTM(3, 4)
    with pytest.raises(ValueError, match="outputs have none in torch and in float64: look for NaN"):
        seqkern.verify(model, torch.full((5, 2, 3), torch.nan))
    result = seqkern.verify(model, torch.randn(5, 2, 3).index_fill_(1, torch.tensor([1]), torch.nan))
    assert result.ok
    assert "output[0]: 20 of 40 numbers are not finite in torch or in float64" in str(result)
    assert "d weight_ih_l0: 48 of 48 numbers are not finite" in str(result)


def test_no_numbers_are_a_success():
    assert seqkern.verify(nn.LSTM(3, 4, batch_first=True), torch.randn(0, 5, 3)).ok


def test_inputs_by_name():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    hidden = torch.tensor([[False] * 5, [False, False, True, True, True]])
    by_name = seqkern.verify(model, q, value=k, key=k.clone(), key_padding_mask=hidden)
    by_place = seqkern.verify(model, q, k.clone(), k, hidden)
    assert sorted(
        row.name for row in by_name.rows if "bias" not in row.name and "weight" not in row.name
    ) == [
        "d input",
        "d key",
        "d value",
        "output[0]",
        "output[1]",
    ]
    assert len(by_name.rows) == len(by_place.rows)


class Weighted(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x, input=None, weight=None):
        x = x if input is None else x * input
        return x @ self.weight if weight is None else x @ self.weight * weight


def test_inputs_whose_name_something_else_has():
    x = torch.randn(2, 3)
    for name in ("input", "weight"):
        rows = seqkern.verify(Weighted(), x, **{name: torch.randn(3)}).rows
        assert {row.name for row in rows} == {"output", "d input", f"d input {name}", "d weight"}
