"""What owners of a model do with it besides calling it, and what they get of torch's modules there."""

import re
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import seqkern
from seqkern import functional
from seqkern.ops import _hardware

E, H, FF, B, L, S = 8, 2, 16, 2, 5, 3


def gradients(module, *inputs):
    found = module(*inputs)
    (found[0] if isinstance(found, tuple) else found).square().sum().backward()
    return [p.grad for p in module.parameters()]


INFERRED = {
    "GRU": (lambda: nn.GRU(E, E, batch_first=True), 1),
    "LSTM": (lambda: nn.LSTM(E, E), 1),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(E, H, batch_first=True), 3),
    "TransformerDecoderLayer": (lambda: nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True), 2),
    "Transformer": (lambda: nn.Transformer(E, H, 1, 1, FF, 0.0, batch_first=True), 2),
}


@pytest.mark.built
@pytest.mark.parametrize("forced", [None, "cpu"])
@pytest.mark.parametrize("name", INFERRED)
def test_what_a_frozen_encoder_gave_in_inference_mode(name, forced):
    """Autograd may not save inference tensors; torch's modules with the batch first happen to copy them."""
    make, inputs = INFERRED[name]
    module = seqkern.accelerate(make())
    with torch.inference_mode():
        x = torch.randn(B, L, E)
    with seqkern.backend(forced):
        got = gradients(module, *(x,) * inputs)
        module.zero_grad()
        want = gradients(module, *(x.clone(),) * inputs)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.built
def test_attention_of_inference_tensors():
    with torch.inference_mode():
        k = torch.randn(B, H, S, 4)
    q = torch.randn(B, H, L, 4, requires_grad=True)
    functional.attention(q, k, k).sum().backward()
    functional.scaled_dot_product_attention(q, k, k).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer"])
def test_signatures_are_torchs(name):
    """skip_init asks a constructor for its device."""
    module = nn.utils.skip_init(getattr(seqkern.nn, name), E, H)
    assert type(module) is getattr(seqkern.nn, name)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_complex_numbers_are_torchs(kind):
    module = kind(3, 4).to(torch.complex64)
    x = torch.randn(*((5, 2, 3) if kind in (nn.LSTM, nn.GRU) else (2, 3)), dtype=torch.complex64)
    want = module(x)[0]
    torch.testing.assert_close(seqkern.accelerate(module)(x)[0], want)


@pytest.mark.native
@pytest.mark.built
class TestFreedStorage:
    """As FSDP does between uses of a layer. torch's layers raise, its LSTM reads where nothing is."""

    says = "no memory: its storage was freed"

    @staticmethod
    def freed(module):
        for p in module.parameters():
            p.data.untyped_storage().resize_(0)
        return module

    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
    def test_layers(self, kind):
        with pytest.raises(RuntimeError, match=self.says):
            self.freed(seqkern.accelerate(kind(3, 4)))(torch.randn(5, 2, 3))

    def test_cells(self):
        with torch.no_grad(), pytest.raises(RuntimeError, match=self.says):
            self.freed(seqkern.accelerate(nn.GRUCell(3, 4)))(torch.randn(2, 3), torch.randn(2, 4))

    def test_between_forward_and_backward(self):
        module = seqkern.accelerate(nn.GRU(3, 4))
        output = module(torch.randn(5, 2, 3))[0]
        self.freed(module)
        with pytest.raises(RuntimeError, match=self.says):
            output.sum().backward()

    def test_attention_and_linear(self):
        q = torch.randn(1, 2, 3, 4)
        k = torch.randn(1, 2, 3, 4)
        k.untyped_storage().resize_(0)
        for call in (functional.attention, functional.scaled_dot_product_attention):
            with pytest.raises(RuntimeError, match=self.says):
                call(q, k, q)
        w = torch.randn(600, 500)
        w.untyped_storage().resize_(0)
        with torch.no_grad(), pytest.raises(RuntimeError, match=self.says):
            functional.linear(torch.randn(16, 500), w)

    def test_a_decoding_step(self):
        stack = seqkern.nn.TransformerEncoder(
            seqkern.nn.TransformerEncoderLayer(E, H, FF, batch_first=True), 1
        )
        stack.eval().requires_grad_(False).layers[0].linear1.weight.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=self.says):
            stack.step(torch.randn(B, 1, E), cache=seqkern.nn.KVCache())


@pytest.mark.parametrize("wanted", [False, True])
def test_inference_tensors_are_copied_where_a_gradient_reads_them(wanted):
    weight = torch.randn(4, 3, requires_grad=wanted)
    with torch.inference_mode():
        x = torch.randn(2, 3)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        functional.linear(x, weight)
    assert ("aten::clone" in {each.key for each in seen.key_averages()}) == wanted


PARTS = {"linear1": nn.Linear, "norm2": nn.LayerNorm, "dropout1": nn.Dropout}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_what_was_replaced_on_a_parts_class_is_called(monkeypatch, name, part, training):
    layer = nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True).train(training)
    x, memory = torch.randn(B, L, E), torch.randn(B, S, E)
    kind = PARTS[part]
    forward = kind.forward
    if name == "forward":
        monkeypatch.setattr(kind, "forward", lambda self, x: 2 * forward(self, x))
    else:
        monkeypatch.setattr(kind, "__call__", lambda self, x: 2 * forward(self, x))
    with torch.set_grad_enabled(training):
        want = layer(x, memory)
        torch.testing.assert_close(seqkern.accelerate(layer)(x, memory), want)


@pytest.mark.built
class TestWhatIsSaved:
    """Only what a gradient reads may not be written to before the backward."""

    def test_the_input_of_frozen_weights(self):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
        y = x * 1
        with seqkern.backend("cpu"):
            z = functional.linear(y, w)
        y.zero_()
        z.sum().backward()
        torch.testing.assert_close(x.grad, w.sum(0).expand(3, 4))

    def test_weights_where_the_input_wants_no_gradient(self):
        x, w = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
        with seqkern.backend("cpu"):
            z = functional.linear(x, w)
        with torch.no_grad():
            w.zero_()
        z.sum().backward()
        torch.testing.assert_close(w.grad, x.sum(0).expand(5, 4))

    def test_what_is_read_is_watched(self):
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        for changed in (x, w):
            with seqkern.backend("cpu"):
                z = functional.linear(x, w)
            with torch.no_grad():
                changed.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                z.sum().backward()


IN_PLACE = {
    "MultiheadAttention": lambda: nn.MultiheadAttention(E, H, batch_first=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(E, H, FF, 0.0, batch_first=True),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(E, H, FF, 0.0, batch_first=True),
    "GRU": lambda: nn.GRU(E, E, batch_first=True),
    "RNN": lambda: nn.RNN(E, E, 2, batch_first=True),
    "LSTM": lambda: nn.LSTM(E, E // 2, bidirectional=True, batch_first=True),
}


@pytest.mark.parametrize("forced", [None, pytest.param("cpu", marks=pytest.mark.built)])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", IN_PLACE)
def test_an_output_may_be_added_to_the_input_in_place(name, train, forced):
    """Where the batch stands first torch saves a copy of the input, by the way, and owners rely on it."""
    layer, before = IN_PLACE[name]().train(train), nn.Linear(3, E)
    start = torch.randn(B, L, 3)
    inputs = {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}.get(name, 1)
    found = []
    for accelerated in (False, True):
        x = before(start)
        with seqkern.backend(forced if accelerated else None):
            output = (seqkern.accelerate(layer) if accelerated else layer)(*[x] * inputs)
            x += output[0] if isinstance(output, tuple) else output
            parameters = [*before.parameters(), *layer.parameters()]
            found.append(torch.autograd.grad(x.square().sum(), parameters))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_a_cell_with_one_bias(kind, missing):
    cell, x = kind(5, 6), torch.randn(3, 5)
    setattr(cell, missing, None)
    h = torch.randn(3, 6)
    states = (None, (h, h) if kind is nn.LSTMCell else h)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for hx in states:
                want = seqkern.restore(cell)(x, hx)
                with seqkern.enable():
                    torch.testing.assert_close(cell(x, hx), want)
                torch.testing.assert_close(seqkern.accelerate(cell)(x, hx), want)
                with seqkern.backend("cpu" if _hardware.CPU_READY else "reference"):
                    torch.testing.assert_close(cell(x, hx), want)


def test_a_layers_outputs_may_be_saved_in_a_checkpoint():
    """Whose mode of dispatch forbids to change in place what an operator returned."""
    saved = checkpoint.CheckpointPolicy.MUST_SAVE, checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
    contexts = partial(
        checkpoint.create_selective_checkpoint_contexts,
        lambda _, op, *args, **kwargs: saved["seqkern" not in str(op)],
    )
    layer, x = seqkern.nn.GRU(4, 8, batch_first=True), torch.randn(2, 3, 4, requires_grad=True)
    found = checkpoint.checkpoint(lambda x: layer(x)[0], x, use_reentrant=False, context_fn=contexts)
    (got,) = torch.autograd.grad(found.square().sum(), x)
    (want,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_second_derivatives_through_frozen_layers(kind, batch_first):
    layer = kind(E, E, 2, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(B, L, E, dtype=torch.float64)
    for frozen in ([".*_l0"], [".*"], ["weight_ih.*"], ["weight_hh.*", "bias.*"]):
        for name, p in layer.named_parameters():
            p.requires_grad_(not any(re.fullmatch(each, name) for each in frozen))
        found = []
        for accelerated in (False, True):
            with seqkern.backend("cpu" if accelerated and _hardware.CPU_READY else None):
                module, given = (
                    (seqkern.accelerate if accelerated else seqkern.restore)(layer),
                    x.clone().requires_grad_(),
                )
                slope = torch.autograd.grad(module(given)[0].square().sum(), given, create_graph=True)[0]
                found.append(torch.autograd.grad(slope.square().sum(), given)[0])
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU])
def test_what_layers_that_are_trained_in_part_do_not_keep(kind):
    for trained in ("bias", "weight_hh"):
        found = []
        for accelerated in (False, True):
            torch.manual_seed(0)
            layer = kind(E, E)
            for name, p in layer.named_parameters():
                p.requires_grad_(trained in name)
            if accelerated:
                seqkern.accelerate(layer)
            x = torch.randn(L, B, E)
            with seqkern.backend("cpu" if accelerated and _hardware.CPU_READY else None):
                x += layer(x)[0]
                loss = x.square().sum()
                with torch.no_grad():
                    layer.bias_hh_l0.add_(1.0)
                found.append(torch.autograd.grad(loss, [p for p in layer.parameters() if p.requires_grad]))
        torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_frozen_layers_keep_no_input(kind, batch_first):
    if kind is nn.LSTM and not batch_first:
        pytest.skip("torch's keeps it")
    layer = kind(E, E, batch_first=batch_first).requires_grad_(False)
    start = torch.randn(B, L, E).requires_grad_()
    found = []
    for accelerated in (False, True):
        with seqkern.backend("cpu" if accelerated and _hardware.CPU_READY else None):
            x = start * 1
            output, _ = (seqkern.accelerate(layer) if accelerated else layer)(x)
            x.mul_(2)
            found.append(torch.autograd.grad(output.square().sum() + x.sum(), start)[0])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.built
@pytest.mark.parametrize("batch_first", [False, True])
def test_an_lstm_keeps_its_output_and_sees_who_writes_to_it(batch_first):
    layer = seqkern.nn.LSTM(E, E, 2, batch_first=batch_first)
    x = torch.randn(B, L, E, requires_grad=True)
    leaves = (x, *layer.parameters())

    def gradients_of(change):
        loss = change(layer(x)[0]).square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), first)
        return first

    want = gradients_of(torch.relu)
    torch.testing.assert_close(gradients_of(torch.relu_), want)
    torch.testing.assert_close(gradients_of(lambda y: y[:, :2].mul_(1.0) is None or y.relu_()), want)
    with torch.autograd.graph.save_on_cpu():  # which must get all that is kept
        torch.testing.assert_close(gradients_of(torch.relu_), want)


@pytest.mark.built
def test_what_an_lstm_keeps_of_its_output_is_freed_with_what_is_saved():
    layer, x = seqkern.nn.LSTM(E, E), torch.randn(B, L, E)
    output, _ = layer(x)
    kept = weakref.ref(output)
    loss = output.sum()
    node = loss.grad_fn.next_functions[0][0]
    del output
    assert kept() is None and node.shared is not None
    loss.backward(retain_graph=True)
    assert node.shared is not None
    loss.backward()
    assert node.shared is None


@pytest.mark.parametrize("options", [{"bidirectional": True}, {"proj_size": 3}], ids=str)
def test_what_nobody_counts_does_not_reach_what_a_copy_is_kept_of(options):
    """torch's output of these is no tensor that its backward reads."""
    layer, found = nn.LSTM(E, E, **options), []
    x = torch.randn(B, L, E)
    for accelerated in (False, True):
        layer = seqkern.accelerate(layer) if accelerated else layer
        with seqkern.backend("cpu" if accelerated and _hardware.CPU_READY else None):
            output, _ = layer(x)
            loss = output.sum()
            output.data.mul_(0)
            found.append(torch.autograd.grad(loss, tuple(layer.parameters())))
    torch.testing.assert_close(found[1], found[0])
