"""FlopCounterMode counts this package's operators as it counts torch's own."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqkern
import seqkern.integrations.flop_counter
from seqkern import functional

pytestmark = pytest.mark.built


def counted(call):
    """What was counted in a call, by operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): count for op, count in counter.get_flop_counts().get("Global", {}).items()}


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_layers_count_as_torch_where_torch_counts(kind):
    layer, x = kind(16, 32, num_layers=2, bidirectional=True), torch.randn(10, 4, 16)
    with torch.no_grad():
        want = sum(counted(lambda: layer(x)).values())
        got = counted(lambda: seqkern.accelerate(layer)(x))
    assert got == {"seqkern.rnn_forward": want}


def test_lstm_with_projection_forward_and_backward():
    T, B, I, H, P = 7, 3, 5, 6, 4
    layer, x = seqkern.nn.LSTM(I, H, proj_size=P), torch.randn(T, B, I)
    got = counted(lambda: layer(x)[0].sum().backward())
    inputs, scanned = T * B * 4 * H * I, T * B * (4 * H * P + H * P)
    assert got["seqkern.rnn_forward"] == 2 * (inputs + scanned)
    assert got["seqkern.rnn_backward"] == 2 * (inputs + 2 * scanned)  # no gradient of the input
    got = counted(lambda: layer(x.requires_grad_())[0].sum().backward())
    assert got["seqkern.rnn_backward"] == 2 * (2 * inputs + 2 * scanned)


def test_packed_sequences_count_their_own_rows():
    layer = seqkern.nn.GRU(5, 6)
    packed = pack_sequence([torch.randn(7, 5), torch.randn(2, 5)])
    with torch.no_grad():
        assert counted(lambda: layer(packed)) == {"seqkern.rnn_forward": 2 * 9 * 18 * (5 + 6)}


def test_attention_forward_and_backward():
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8), torch.randn(2, 2, 11, 6)
    q.requires_grad_()
    got = counted(lambda: functional.attention(q, k, v, causal=True).sum().backward())
    pairs = 2 * 4 * 9 * 11
    assert got == {
        "seqkern.attention": 2 * pairs * (8 + 6),
        "seqkern.attention_backward": 2 * pairs * (3 * 8 + 2 * 6),
    }


def test_packed_attention_counts_its_own_pairs():
    q = torch.randn(9, 2, 8)
    starts = torch.tensor([0, 2, 9], dtype=torch.int32)
    got = counted(lambda: functional.attention(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts))
    assert got == {"seqkern.attention": 2 * 2 * (2 * 2 + 7 * 7) * (8 + 8)}


def test_lengths_that_nobody_knows_yet_are_the_longest():
    q, starts = torch.randn(9, 2, 8, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    tensors = seqkern.spec.attention.Tensors(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts)
    options = seqkern.spec.attention.Options(0.5, max_seqlen_q=7, max_seqlen_k=7)
    got = counted(lambda: torch.ops.seqkern.attention(*tensors, *options))
    assert got == {"seqkern.attention": 2 * 2 * (2 * 7 * 7) * (8 + 8)}


def test_scaled_dot_product_attention_counts_once():
    """Without a gradient another operator would serve it, which the counter does not know."""
    q = torch.randn(2, 4, 9, 8)
    got = counted(lambda: functional.scaled_dot_product_attention(q, q, q))
    assert got == {"seqkern.attention": 2 * (2 * 4 * 9 * 9) * (8 + 8)}


@pytest.mark.parametrize("memory", [False, True])
def test_a_decoding_step_counts_its_products(memory):
    E, F, L, S = 32, 64, 3, 5
    if memory:
        stack = seqkern.nn.TransformerDecoder(
            seqkern.nn.TransformerDecoderLayer(E, 4, F, batch_first=True), 2
        )
    else:
        stack = seqkern.nn.TransformerEncoder(
            seqkern.nn.TransformerEncoderLayer(E, 4, F, batch_first=True), 2
        )
    stack.eval()
    x = torch.randn(2, L, E)
    with torch.no_grad():
        cache, rest = seqkern.nn.KVCache(), (torch.randn(2, S, E),) if memory else ()
        stack.step(x, *rest, cache=cache)
        got = counted(lambda: stack.step(x[:, :1], *rest, cache=cache))
    attention = 2 * (L + 1) * E + (2 * S * E if memory else 0)
    products = 4 * E * E + (2 * E * E if memory else 0) + 2 * E * F
    assert sum(got.values()) == 2 * 2 * 2 * (products + attention)


def test_linear_and_its_gradients():
    x, w = torch.randn(64, 48, requires_grad=True), torch.randn(96, 48, requires_grad=True)
    with seqkern.backend("cpu"):
        got = counted(lambda: functional.linear(x, w).sum().backward())
    assert got["seqkern.linear"] == 2 * 64 * 48 * 96
    assert sum(got.values()) == 3 * 2 * 64 * 48 * 96
