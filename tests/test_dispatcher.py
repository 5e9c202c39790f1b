"""enable(): torch's own operators on our kernels, equal to torch's, and exactly undone."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import seqkern
from seqkern import dispatcher
from seqkern.dispatcher import choice
from seqkern.ops import _backend, _torchs_own
from seqkern.testing import without_torchs_warnings

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:Converting mask without torch.bool"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]

OPERATORS = [name for _, stand_ins in dispatcher._FORMS for name in stand_ins]
RECURRENT = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs),
}
CELLS = {
    "lstm_cell": nn.LSTMCell,
    "gru_cell": nn.GRUCell,
    "rnn_tanh_cell": nn.RNNCell,
    "rnn_relu_cell": lambda *args: nn.RNNCell(*args, nonlinearity="relu"),
}


@pytest.fixture(autouse=True)
def off_again():
    yield
    seqkern.disable()


def dump() -> list[str]:
    return [torch._C._dispatch_dump(f"aten::{name}") for name in OPERATORS]


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, PackedSequence):
        return [found.data]
    if isinstance(found, Tensor):
        return [found.to_padded_tensor(0.0) if found.is_nested else found]
    return [t for each in found if each is not None for t in flat(each)]


def both(call: Callable[[], Any], backend: str | None = None) -> list[tuple[str, str]]:
    """Runs a call by torch and enabled, which must give the same; (op, backend) of each choice that was seen."""
    want = flat(call())
    with seqkern.enable(), _backend.watch() as seen, seqkern.backend(backend):
        got = flat(call())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)
    return [(each.op, made.name) for each, made in seen]


def test_undone_exactly():
    before, tag = dump(), torch.compiler.config.cache_key_tag
    seqkern.enable()
    after = dump()
    assert not any(a == b for a, b in zip(before, after))
    seqkern.enable()
    assert dump() == after and torch.compiler.config.cache_key_tag != tag
    seqkern.disable()
    assert dump() == before and torch.compiler.config.cache_key_tag == tag
    seqkern.disable()


def test_a_context_undoes_what_it_did_and_no_more():
    before = dump()
    with seqkern.enable():
        with seqkern.enable():
            pass
        assert dump() != before
    assert dump() == before
    with pytest.raises(KeyError), seqkern.enable():
        raise KeyError
    assert dump() == before and not _torchs_own.standing_in


def test_nothing_is_half_enabled(monkeypatch):
    before, real, left = dump(), torch.library.Library.impl, [7]

    def impl(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("refused")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.library.Library, "impl", impl)
    with pytest.raises(RuntimeError, match="refused"):
        seqkern.enable()
    assert dump() == before and not _torchs_own.standing_in
    seqkern.enable()
    assert dump() != before


def test_quiet_and_with_every_operator():
    """In a fresh process, since torch warns of a replaced kernel once."""
    code = (
        "import warnings, torch\n"
        "warnings.simplefilter('error')\n"
        "import seqkern\n"
        "assert 'seqkern.dispatcher' not in __import__('sys').modules\n"
        "seqkern.enable()\n"
        "seqkern.enable()\n"
        "seqkern.disable()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


@dataclass(frozen=True)
class Layers:
    """A form of torch's recurrent layers."""

    options: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    state: bool = False


FORMS = {
    "plain": Layers(),
    "stacked": Layers({"num_layers": 2, "bidirectional": True, "bias": False}),
    "batch_first": Layers({"batch_first": True}, state=True),
    "packed": Layers({"num_layers": 2, "bidirectional": True}, packed=True),
    "one batch_size": Layers(packed=True, state=True),
}


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("mode", ["gradients", "no_grad", "inference"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", RECURRENT)
def test_layers(cell, form, mode):
    case = FORMS[form]
    layer = RECURRENT[cell](4, 6, **case.options)
    x = torch.randn(3, 3, 4)
    given: Any = pack_sequence([torch.randn(n, 4) for n in (5, 3, 2)]) if case.packed else x
    if case.state:
        h = torch.randn(1, 3, 6)
        state = (h, torch.randn(1, 3, 6)) if cell == "lstm" else h
    else:
        state = None

    def call():
        found = layer(given, state)
        if mode != "gradients":
            return found
        return found, torch.autograd.grad(
            sum(t.square().sum() for t in flat(found)), list(layer.parameters())
        )

    with {"gradients": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[
        mode
    ]():
        assert both(call) == [(cell, "cpu")]


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
def test_projected_layer():
    layer, x = nn.LSTM(4, 6, proj_size=3, num_layers=2), torch.randn(5, 2, 4)
    with without_torchs_warnings():
        assert both(lambda: layer(x)) == [("lstm", "cpu")]


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("shape", [(3, 4), (4,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_cells(cell, bias, shape):
    module, x = CELLS[cell](4, 6, bias), torch.randn(shape)
    with torch.no_grad():
        assert both(lambda: module(x)) == [(cell, "cpu")]

    def gradients():
        return torch.autograd.grad(flat(module(x))[0].sum(), list(module.parameters()))

    assert both(gradients) == [(cell, "cpu")]


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("cell", [*RECURRENT, *CELLS])
def test_a_forced_reference_runs(cell):
    """Of each operator, where there are no compiled kernels too."""
    module = {**RECURRENT, **CELLS}[cell](4, 6)
    x = torch.randn(3, 4) if cell in CELLS else torch.randn(5, 3, 4)
    assert both(lambda: module(x), "reference") == [(cell, "reference")]
    assert both(lambda: module(x), "torch") == [(cell, "torch")]


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "bool mask": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.3},
    "float mask": {"attn_mask": torch.randn(1, 4, 5, 7)},
    "grouped": {"enable_gqa": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("form", ATTENTION)
def test_attention(form, grad):
    heads = 2 if form == "grouped" else 4
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 8)
    q, k, v = (x.requires_grad_(grad) for x in (q, k, v))

    def call():
        output = F.scaled_dot_product_attention(q, k, v, **ATTENTION[form])
        return (output, torch.autograd.grad(output.square().sum(), (q, k, v))) if grad else output

    assert both(call, "reference") == [("attention", "reference")]
    assert both(call, "torch") == [("attention", "torch")]
    assert [op for op, _ in both(call)] == ["attention"]  # whatever serves it here


def padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
MASKS = {
    "plain": {},
    "padding": {"key_padding_mask": padding(5, 3)},
    "causal": {"attn_mask": CAUSAL},
    "both": {"attn_mask": CAUSAL, "key_padding_mask": padding(5, 3)},
}


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("mask", MASKS)
def test_fast_path_of_multihead_attention(mask, weights):
    module, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(2, 5, 16)
    options = {"need_weights": weights != "none", "average_attn_weights": weights != "heads"}
    with torch.inference_mode():
        seen = both(lambda: module(x, x, x, **options, **MASKS[mask]), "reference")
    assert seen == [("attention", "reference")]


@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", MASKS)
def test_fast_path_of_the_encoder(mask, activation, norm_first):
    layer = nn.TransformerEncoderLayer(
        16, 4, 32, batch_first=True, activation=activation, norm_first=norm_first
    )
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 5, 16)
    names = {"key_padding_mask": "src_key_padding_mask", "attn_mask": "mask"}
    options = {names[name]: value for name, value in MASKS[mask].items()}
    with torch.inference_mode():
        seen = both(lambda: encoder(x, **options), "reference")
        assert seen == [("attention", "reference")] * 2
        assert [op for op, _ in both(lambda: encoder(x, **options))] == ["attention"] * 2


def test_a_nested_tensor_of_several_lengths():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    rows = [torch.randn(n, 16) for n in (4, 1, 6)]
    nested = torch.nested.nested_tensor(rows)
    with torch.inference_mode():
        assert both(lambda: layer(nested), "reference") == [("attention", "reference")]
        assert both(lambda: layer.self_attn(nested, nested, nested, need_weights=False), "reference")
        with seqkern.enable(), seqkern.backend("reference"):
            assert [t.shape for t in layer(nested).unbind()] == [t.shape for t in rows]


def test_nobody_is_asked_about_what_stays_torchs():
    """Transforms, subclasses and jagged tensors reach torch's kernels as without enable."""
    q = torch.randn(2, 4, 5, 8)
    jagged = torch.nested.nested_tensor(
        [torch.randn(n, 2, 8) for n in (3, 5)], layout=torch.jagged
    ).transpose(1, 2)

    class Sub(Tensor):
        pass

    for call in (
        lambda: torch.func.vmap(F.scaled_dot_product_attention)(q[None], q[None], q[None]),
        lambda: torch.func.grad(lambda x: F.scaled_dot_product_attention(x, x, x).sum())(q),
        lambda: F.scaled_dot_product_attention(*[q.as_subclass(Sub)] * 3).as_subclass(Tensor),
        lambda: F.scaled_dot_product_attention(jagged, jagged, jagged).unbind(),
    ):
        assert {name for _, name in both(call)} <= {"torch"}


def test_ours_that_falls_back_is_seen_once():
    """A call that seqkern's own functions hand to torch comes by here again, and must not go around."""
    q, x = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3)
    layer, cell = seqkern.nn.GRU(3, 4), seqkern.nn.LSTMCell(3, 4)
    calls = (
        lambda: seqkern.functional.scaled_dot_product_attention(q, q, q),
        lambda: seqkern.functional.attention(q, q, q, causal="bottom-right", window=1),
        lambda: layer(x),
        lambda: cell(x[0]),
    )
    for call in calls:
        ((_, backend),) = both(call, "torch")
        assert backend == "torch"
    assert not _torchs_own.here.own


def test_sdpa_kernel_is_obeyed():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q = torch.randn(1, 2, 3, 4)
    with sdpa_kernel(SDPBackend.MATH):
        assert {name for _, name in both(lambda: F.scaled_dot_product_attention(q, q, q))} == {"torch"}


def test_errors_are_torchs_and_leave_nothing_behind():
    layer, gru, cell = nn.LSTM(4, 6), nn.GRU(4, 6), nn.GRUCell(4, 6)
    x = torch.randn(5, 3, 4)
    calls = [
        lambda: layer(torch.randn(5, 2, 3)),
        lambda: cell(torch.randn(2, 3)),
        lambda: F.scaled_dot_product_attention(*(torch.randn(1, 1, 2, n) for n in (4, 5, 4))),
        lambda: torch.gru(x, torch.zeros(1, 1, 6), gru._flat_weights, True, 1, 0.0, False, False, False),
        lambda: torch._VF.lstm_cell(torch.randn(2, 4), (torch.randn(2, 6),), *layer._flat_weights),
    ]
    for call in calls:
        with pytest.raises((RuntimeError, ValueError, IndexError)) as want:
            call()
        with seqkern.enable(), pytest.raises(type(want.value)):
            call()
    assert not _torchs_own.here.own


@pytest.mark.built
def test_a_default_device_does_not_hide_the_kernels():
    choice.attention_has_kernels.cache_clear()
    with torch.device("meta"):
        assert choice.attention_has_kernels("cpu")


@pytest.mark.built
def test_small_calls_stay_torchs():
    q, cell, x = torch.randn(1, 2, 3, 4, requires_grad=True), nn.LSTMCell(8, 8), torch.randn(1, 8)
    assert {name for _, name in both(lambda: F.scaled_dot_product_attention(q, q, q))} == {"torch"}
    with torch.no_grad():
        assert both(lambda: cell(x)) == [("lstm_cell", "torch")]
        assert both(lambda: nn.RNN(4, 4)(torch.ones(7, 1, 4))[0] * 0) == [("rnn_tanh", "torch")]


@pytest.mark.built
def test_explained():
    model = nn.Sequential(nn.LSTM(8, 8))
    with seqkern.enable():
        (row,) = seqkern.explain(model, torch.randn(5, 2, 8)).rows
        assert (row.name, row.kind, row.backend, row.calls) == ("0", "torch.nn.LSTM", "cpu", 1)
        with torch.no_grad():
            (row,) = seqkern.explain(nn.LSTMCell(8, 8), torch.randn(2, 8)).rows
        assert row.backend == "torch" and row.declined == (("cpu", choice.TOO_SMALL),)
        (row,) = seqkern.explain(F.scaled_dot_product_attention, *torch.randn(3, 2, 4, 5, 8)).rows
        assert row.kind == "attention" and row.calls == 1


@pytest.mark.built
def test_autocast_keeps_torchs_casts():
    layer, x = nn.GRU(8, 8), torch.randn(5, 2, 8)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert both(call) == [("gru", "torch")]


@pytest.mark.usefixtures("everything_is_worth_it")
def test_autocast_casts_before_attention_is_ours():
    q = torch.randn(1, 2, 6, 8)

    def call():
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(q, q, q)

    want = call()
    with seqkern.enable(), seqkern.backend("reference"), _backend.watch() as seen:
        got = call()
    assert [each.tensors[0].dtype for each, _ in seen if each.tensors[0] is not None] == [torch.bfloat16]
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_records_torchs_operators():
    q, x = torch.randn(1, 2, 6, 8), torch.randn(3, 2, 4)
    with seqkern.enable(), torch.no_grad():
        traces = [
            torch.jit.trace(nn.LSTM(4, 4), (x,)),
            torch.jit.trace(lambda q: F.scaled_dot_product_attention(q, q, q), (q,)),
        ]
    for trace in traces:
        assert not any("seqkern" in node.kind() for node in trace.inlined_graph.nodes())


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
def test_several_threads():
    layer, x = nn.GRU(8, 8), torch.randn(9, 2, 8)
    want, found = layer(x)[0], []

    def work():
        for _ in range(20):
            found.append(layer(x)[0])

    with seqkern.enable():
        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert len(found) == 60
    for each in found:
        torch.testing.assert_close(each, want)


@pytest.mark.built
@pytest.mark.usefixtures("everything_is_worth_it")
def test_a_scripted_model_runs_on_us():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0]

    scripted, x = torch.jit.script(Model()), torch.randn(5, 2, 4)
    with torch.no_grad():
        assert both(lambda: scripted(x)) == [("gru", "cpu")]
