"""The README's table of what is served: every claim in it is run."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import seqkern
from seqkern.bench import tables
from seqkern.explanation import Explanation
from seqkern.ops import _linear_backends
from seqkern.testing import DTYPES

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN"
)  # torch's

README = Path(__file__).resolve().parents[1] / "README.md"
MODULES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
T, B, I, H = 6, 2, 3, 5


def batch(cell: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn((B, I) if cell else (T, B, I), dtype=dtype),)


def one(cell: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    return (torch.randn((I,) if cell else (T, I), dtype=dtype),)


def packed(cell: bool, dtype: torch.dtype) -> tuple[Any, ...]:
    return (pack_sequence([torch.randn(n, I, dtype=dtype) for n in (4, 2)]),)


@torch.no_grad()
def straight(model: torch.nn.Module, *inputs: Any) -> Explanation:
    return seqkern.explain(model, *inputs)


def with_a_gradient(model: torch.nn.Module, *inputs: Any) -> Explanation:
    return seqkern.explain(model, *inputs)


def under_autocast(model: torch.nn.Module, *inputs: Any) -> Explanation:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return seqkern.explain(model, *inputs)


def inside_vmap(model: torch.nn.Module, x: torch.Tensor) -> Explanation:
    return seqkern.explain(torch.func.vmap(model, randomness="different"), x[None])


@dataclass(frozen=True)
class Way:
    """A line of the table: how the module is built, what it is given and how it is called."""

    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[..., tuple[Any, ...]] = batch
    call: Callable[..., Any] = straight


WAYS = {
    "a batch": Way(),
    "one sequence, unbatched": Way(inputs=one),
    "`PackedSequence`": Way(inputs=packed),
    "`batch_first`": Way({"batch_first": True}),
    "`num_layers`, `dropout`": Way({"num_layers": 2, "dropout": 0.5}),
    "`bidirectional`": Way({"bidirectional": True}),
    "`proj_size`": Way({"proj_size": 2}),
    "`bias=False`": Way({"bias": False}),
    '`nonlinearity="relu"`': Way({"nonlinearity": "relu"}),
    "where a gradient is needed": Way(call=with_a_gradient),
    "under `torch.autocast`": Way(call=under_autocast),
    "in `torch.func.vmap`": Way(call=inside_vmap),
}


def claims() -> list[tuple[str, str, str]]:
    """(line, module, backend) for each cell of the table."""
    lines = tables.between(README, "support").splitlines()
    head, _, *body = [[each.strip() for each in line.strip("|").split("|")] for line in lines]
    assert tuple(head[1:]) == MODULES
    return [(way, module, claim) for way, *found in body for module, claim in zip(head[1:], found)]


def test_table_has_every_line():
    assert [way for way, module, _ in claims() if module == MODULES[0]] == list(WAYS)


@pytest.mark.built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("way", "module", "claim"), claims())
def test_claim(way, module, claim, dtype, monkeypatch):
    monkeypatch.setattr(_linear_backends, "BF16_TILES", False)
    if "autocast" in way and module == "LSTM" and torch.bfloat16 in _linear_backends.TERM_BY_TERM:
        claim = "cpu"  # as README says below the table
    case, cell = WAYS[way], module.endswith("Cell")
    inputs = case.inputs(cell, dtype)
    if claim == "-":
        for package in (torch.nn, seqkern.nn):
            with pytest.raises((TypeError, ValueError, AttributeError)):
                getattr(package, module)(I, H, dtype=dtype, **case.options)(*inputs)
        return
    model = getattr(seqkern.nn, module)(I, H, dtype=dtype, **case.options)
    assert {row.backend for row in case.call(model, *inputs).rows} == {claim}
    if case.call is straight:
        output = model(*inputs)
        first = output if isinstance(output, torch.Tensor) else output[0]
        (first if isinstance(first, torch.Tensor) else first.data).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_dtypes_named():
    text = inspect.cleandoc(README.read_text())
    (line,) = [each for each in text.splitlines() if each.startswith("Which backend serves what")]
    assert all(str(dtype)[6:] in line for dtype in DTYPES)
