"""What only a GPU can show of the recurrent Triton kernels: calls captured in a CUDA graph, and wide batches."""

import pytest
import torch

import seqkern
from seqkern.kernels import tuning_cache
from seqkern.ops._backend import watch
from seqkern.testing import make_case, run_op

pytestmark = pytest.mark.gpu
on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="measured on Hopper"
)


@pytest.mark.parametrize("way", ["", "steps", "persistent"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_a_captured_graph_replays(kind, way):
    layer = getattr(seqkern.nn, kind)(16, 32, bidirectional=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(7, 5, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def run():
        output, _ = layer(x)
        return [output, *torch.autograd.grad(output.square().sum(), wanted)]

    with seqkern.backend("triton"), tuning_cache.forced({}, **({way: True} if way else {})):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        for _ in range(2):
            with torch.no_grad():
                x.copy_(torch.randn_like(x))
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, run(), strict=True))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
@pytest.mark.parametrize("steps", [False, True], ids=["sequence", "steps"])
def test_many_sequences_give_the_same_bits_twice(cell, steps):
    """Races show here, and nowhere in an interpreter that runs one block after another."""
    case = make_case(cell, "packed", torch.bfloat16, T=9, B=700, I=64, H=64, bidirectional=True)
    case = type(case)(
        cell,
        *(
            tuple(t.cuda() if t is not None and t.is_floating_point() else t for t in each)
            for each in (case.tensors, case.grads)
        ),
    )
    with seqkern.backend("triton"), tuning_cache.forced({}, steps=steps):
        first = run_op(case)
        for _ in range(3):
            again = run_op(case)
            assert [name for name in first if not torch.equal(first[name], again[name])] == []


CHOSEN = [
    ("LSTM", torch.bfloat16, 128, 64, "triton"),
    ("GRU", torch.bfloat16, 768, 64, "triton"),  # persistent
    ("RNN", torch.bfloat16, 1024, 64, "triton"),
    ("LSTM", torch.bfloat16, 2048, 64, "torch"),  # fits nowhere
    ("LSTM", torch.bfloat16, 128, 4, "torch"),
    ("LSTM", torch.float16, 128, 64, "torch"),
    ("LSTM", torch.float32, 128, 64, "torch"),
]


@on_hopper
@pytest.mark.parametrize(("kind", "dtype", "H", "T", "name"), CHOSEN)
def test_what_is_chosen_unasked(kind, dtype, H, T, name):
    layer = getattr(seqkern.nn, kind)(16, H, device="cuda", dtype=dtype)
    x = torch.randn(T, 5, 16, device="cuda", dtype=dtype)
    assert [row.backend for row in seqkern.explain(layer, x).rows] == [name]
    output, _ = layer(x)
    with seqkern.backend("reference"):
        want, _ = layer(x)
    assert (output - want).norm() < 0.02 * want.norm()


@on_hopper
@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "torch"),
        ({"causal": True}, "torch"),
        ({"causal": True, "window": (255, 0)}, "triton"),
        ({"softcap": 30.0}, "triton"),
    ],
    ids=str,
)
def test_attention_that_is_chosen_unasked(options, name):
    q, k, v = torch.randn(3, 2, 8, 4096, 64, device="cuda", dtype=torch.bfloat16)
    with watch() as seen:
        output = seqkern.functional.attention(q, k, v, **options)
    assert [choice.name for _, choice in seen] == [name]
    want = seqkern.functional.attention(q[:1, :1], k[:1, :1], v[:1, :1], **options, backend="reference")
    assert (output[:1, :1] - want).norm() < 0.02 * want.norm()
