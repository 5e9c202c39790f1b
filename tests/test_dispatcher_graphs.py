"""enable() beside a compiler: what a graph holds, and what is traced."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqkern


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it", "fresh_compiler")
def test_a_graph_keeps_what_it_was_compiled_with():
    from torch._dynamo.backends.common import aot_autograd

    operators: list[str] = []

    def note(graph, _):
        operators.extend(str(n.target) for n in graph.graph.nodes)
        return graph

    cell, x = nn.GRUCell(4, 6), torch.randn(3, 4)
    compiled = torch.compile(cell, backend=aot_autograd(fw_compiler=note), fullgraph=True)
    with torch.no_grad():
        want = cell(x)
        with seqkern.enable():
            torch.testing.assert_close(compiled(x), want)
        torch.testing.assert_close(compiled(x), want)
    assert operators.count("seqkern.rnn_forward.default") == 1


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it", "fresh_compiler")
def test_a_compiler_does_not_follow_us_behind_a_graph_it_broke():
    torch._dynamo.utils.counters.clear()
    with seqkern.enable(), torch.no_grad():
        for size in (4, 5):
            lstm, x = nn.LSTM(3, size), torch.randn(2, 1, 3)
            model = nn.Sequential(nn.Linear(3, 3), lstm)
            torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["total"] == 1, frames  # the model's; ours would be two more


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_attention_and_what_it_hands_on():
    """Traced where functional's own hand-over to torch would come by again."""
    q = torch.randn(1, 2, 6, 4)

    def call(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    want = call(q)
    for backend in ("reference", "torch"):
        torch._dynamo.reset()
        with seqkern.enable(), seqkern.backend(backend):
            torch.testing.assert_close(torch.compile(call, backend="aot_eager", fullgraph=True)(q), want)
