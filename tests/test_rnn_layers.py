"""A stack of recurrent layers by the op that checks, chooses and computes in one call."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqkern
from seqkern.ops import _linear_backends
from seqkern.testing import DTYPES, on_threads, poison

pytestmark = [pytest.mark.native, pytest.mark.built]
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN, "rnn_relu": nn.RNN}
T, B, I, H = 5, 3, 7, 10
op = torch.ops.seqkern.rnn_layers


def module_of(cell, *sizes, **options):
    more = {"nonlinearity": "relu"} if cell == "rnn_relu" else {}
    return getattr(seqkern.nn, KINDS[cell].__name__)(*sizes, **options, **more)


def states(module, batch=B, dtype=torch.float32):
    """h, and c of an LSTM."""
    sets = module.num_layers * (2 if module.bidirectional else 1)
    h = torch.randn(sets, batch, module.proj_size or module.hidden_size).to(dtype)
    return h, (
        torch.randn(sets, batch, module.hidden_size).to(dtype) if type(module) is seqkern.nn.LSTM else None
    )


def call(module, cell, x, h, c):
    options = module.num_layers, module.bidirectional, module.batch_first, cell
    return op(x, h, c, module._flat(), *options)


def by_layers(module, x, h, c):
    """What the op for each layer gives."""
    with seqkern.backend("cpu"):
        output, state = module(x, h if h is None or c is None else (h, c))
    return output, *(state if isinstance(state, tuple) else (state, None))


def assert_equal(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.shape == b.shape and torch.equal(a, b)


OPTIONS = [
    {},
    {"num_layers": 3},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"batch_first": True},
    {"bias": False, "num_layers": 2},
]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "options", [*OPTIONS, {"proj_size": 4, "num_layers": 2, "bidirectional": True}], ids=str
)
@pytest.mark.parametrize("cell", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_is_what_the_layers_give(isa, dtype, cell, options, given):
    if "proj_size" in options and cell != "lstm":
        options = {**options}
        del options["proj_size"]
    module = module_of(cell, I, H, **options).to(dtype)
    x = torch.randn(T, B, I).to(dtype)
    x = x.transpose(0, 1).contiguous() if module.batch_first else x
    h, c = states(module, dtype=dtype) if given else (None, None)
    want = by_layers(module, x, h, c)
    poison(*want)
    got = call(module, cell, x, h, c)
    assert_equal(got, want)
    taken = {t.data_ptr() for t in (x, h, c) if t is not None}
    assert not taken & {t.data_ptr() for t in got if t is not None}


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 40, 3, 20), (70, 1, 5, 33), (1, 131, 9, 40)], ids=str)
@pytest.mark.parametrize("cell", KINDS)
@torch.no_grad()
def test_other_sizes(isa, cell, sizes):
    steps, batch, inputs, hidden = sizes
    module = module_of(cell, inputs, hidden, 2, bidirectional=True)
    x, (h, c) = torch.randn(steps, batch, inputs), states(module, batch)
    assert_equal(call(module, cell, x, h, c), by_layers(module, x, h, c))


@torch.no_grad()
def test_inputs_that_lie_otherwise():
    module = module_of("gru", I, H, 2)
    h, _ = states(module)
    wide = torch.full((T, 2 * B, I + 3), torch.nan)
    for x in (torch.randn(B, T, I).transpose(0, 1), torch.randn(T, 1, I).expand(T, B, I)):
        assert_equal(call(module, "gru", x, h, None), by_layers(module, x, h, None))
        wide[:, ::2, :I] = x
        assert_equal(call(module, "gru", wide[:, ::2, :I], h, None), by_layers(module, x, h, None))


@torch.no_grad()
def test_any_number_of_threads():
    module = module_of("lstm", 40, 70, 2, bidirectional=True)
    x, (h, c) = torch.randn(9, 17, 40), states(module, 17)
    first, *others = on_threads(lambda: call(module, "lstm", x, h, c))
    for other in others:
        assert_equal(other, first)


def test_opcheck():
    for options in ({}, {"num_layers": 2, "batch_first": True, "bidirectional": True}):
        module = module_of("lstm", I, H, **options).requires_grad_(False)
        x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
        h, c = states(module)
        tests = ("test_schema", "test_faketensor")
        flat = module._flat()
        more = module.num_layers, module.bidirectional, module.batch_first, "lstm"
        torch.library.opcheck(op.default, (x, h, c, flat, *more), test_utils=tests)


def changed(at, change):
    return lambda given: [change(each) if i == at else each for i, each in enumerate(given)]


def of_weights(at, change):
    return changed(3, lambda weights: [change(w) if i == at else w for i, w in enumerate(weights)])


NOT_SERVED = {
    "one sequence": changed(0, lambda x: x[:, 0]),
    "no steps": changed(0, lambda x: x[:0]),
    "no rows": changed(0, lambda x: x[:, :0]),
    "other features": changed(0, lambda x: x[..., :3]),
    "features apart": changed(0, lambda x: x.mT.contiguous().mT),
    "another dtype": changed(0, lambda x: x.double()),
    "whole numbers": changed(0, lambda x: x.long()),
    "h of another batch": changed(1, lambda h: h[:, :1]),
    "h of a layer": changed(1, lambda h: h[:1]),
    "h of a row": changed(1, lambda h: h[:, 0]),
    "h that lies otherwise": changed(1, lambda h: h.transpose(0, 1).contiguous().transpose(0, 1)),
    "h of another dtype": changed(1, lambda h: h.double()),
    "h without c": changed(2, lambda c: None),
    "c without h": changed(1, lambda h: None),
    "c of another size": changed(2, lambda c: c[..., :2]),
    "no weights": changed(3, lambda weights: []),
    "weights of a layer": changed(3, lambda weights: weights[:4]),
    "weights of more layers": changed(3, lambda weights: weights + weights[:2]),
    "a transposed weight": of_weights(1, lambda w: w.t().contiguous().t()),
    "a weight of another size": of_weights(4, lambda w: w[:, :3]),
    "a weight of another dtype": of_weights(5, lambda w: w.double()),
    "a bias of another size": of_weights(7, lambda w: w[:3]),
    "vectors for matrices": of_weights(1, lambda w: w[0]),
    "weights of no units": changed(3, lambda weights: [w[:0] for w in weights]),
    "no layers": changed(4, lambda n: 0),
    "fewer layers": changed(4, lambda n: 1),
    "two directions": changed(5, lambda b: True),
}


@pytest.mark.parametrize("name", NOT_SERVED)
@torch.no_grad()
def test_what_it_does_not_serve(name):
    module = module_of("lstm", I, H, 2)
    given = [torch.randn(T, B, I), *states(module), module._flat(), 2, False, False]
    assert op(*given, "lstm")[0] is not None
    assert op(*NOT_SERVED[name](given), "lstm") == (None, None, None)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_modules_go_by_it_where_nobody_looks_on(served, cell):
    module, x = module_of(cell, I, H, 2, dropout=0.5).eval(), torch.randn(T, B, I)

    def within(context, run=lambda: module(x)):
        with torch.no_grad(), context:
            return served("_stack", run)

    assert within(torch.no_grad()) == within(torch.inference_mode()) == 1
    assert served("_stack", lambda: module(x)) == 0  # a gradient
    assert within(torch.no_grad(), lambda: module(x[:, 0])) == 0  # one sequence
    assert within(torch.no_grad(), lambda: module(pack_sequence([x[:, 0], x[:2, 1]]))) == 0
    assert within(torch.autocast("cpu", torch.bfloat16)) == 0
    assert within(seqkern.backend("reference")) == within(seqkern.backend("cpu")) == 0
    assert within(FlopCounterMode(display=False)) == 0
    assert within(torch.autograd.forward_ad.dual_level()) == 0
    assert within(torch.no_grad(), lambda: seqkern.explain(module, x)) == 0
    module.train()
    assert within(torch.no_grad()) == 0  # dropout


@torch.no_grad()
def test_the_batch_first_may_be_written_to():
    for cell in ("lstm", "gru"):
        module = module_of(cell, I, H, batch_first=True)
        output, _ = module(torch.randn(B, T, I))
        with torch.enable_grad():
            output += torch.ones(H, requires_grad=True)
        assert output.requires_grad


@torch.no_grad()
def test_bfloat16_on_tiles_goes_the_long_way(served, monkeypatch):
    module = module_of("gru", I, H).bfloat16()
    x = torch.randn(T, B, I).bfloat16()
    assert served("_stack", lambda: module(x)) == 1
    monkeypatch.setattr(_linear_backends, "BF16_TILES", True)
    assert served("_stack", lambda: module(x)) == 0


def test_large_memory_is_kept_and_taken_again():
    """Packed weights of more than a thread's small blocks, growing and shrinking, in more threads than may keep one."""
    layers = [nn.LSTM(size, size).requires_grad_(False) for size in (700, 900, 560)]
    given = [torch.randn(2, 40, layer.hidden_size) for layer in layers]
    want = [layer(x)[0] for layer, x in zip(layers, given)]
    for layer in layers:
        seqkern.accelerate(layer)

    def run(first: int):
        for i in (0, 1, 0, 2, first % 3, 1):
            torch.testing.assert_close(layers[i](given[i])[0], want[i], rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(4)))
    run(0)
