"""nn.Linear: torch's in all that a model may do with it, on our kernels where those are the faster ones."""

import copy
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import seqkern
from seqkern.nn import linear as linear_module
from seqkern.nn._step import is_plain
from seqkern.ops import _linear_backends, linear
from seqkern.testing import DTYPES, relative_rms, tolerance

LARGE, ROWS = 512, 16  # features and rows of a layer that is ours without a gradient, on every processor


def pair(K=6, N=7, dtype=torch.float32, **options):
    """torch's layer and its twin, of the same numbers."""
    theirs = nn.Linear(K, N, dtype=dtype, **options)
    return theirs, seqkern.accelerate(copy.deepcopy(theirs))


def same(got, want, exact=None):
    assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad)
    exact = want.double() if exact is None else exact
    assert relative_rms(got, exact) <= tolerance(got.dtype, relative_rms(want, exact))


@pytest.mark.native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_are_torchs(run_on, dtype, bias):
    for lead in ((), (0,), (1,), (3,), (16,), (2, 5, 3), (67,)):
        for K, N in ((1, 1), (6, 7), (LARGE, LARGE + 3)):
            theirs, ours = pair(K, N, dtype, bias=bias)
            x = torch.randn(*lead, K).to(dtype)
            with torch.no_grad():
                same(ours(x), theirs(x), copy.deepcopy(theirs).double()(x.double()))
            inputs = x.requires_grad_(), x.detach().double().requires_grad_()
            exact = copy.deepcopy(theirs).double()
            grad = torch.randn(*lead, N).to(dtype)
            found = [
                torch.autograd.grad(layer(at), (at, *layer.parameters()), grad.to(at.dtype))
                for layer, at in ((ours, inputs[0]), (theirs, inputs[0]), (exact, inputs[1]))
            ]
            for got, want, wide in zip(*found):
                same(got, want, wide)


@pytest.mark.native
@pytest.mark.built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, LARGE, 2 * LARGE])
def test_the_rules_say_whose_it_is(dtype, size):
    _, ours = pair(size, size, dtype)
    for rows in (1, 2, 4, 5, 16, 17, 100):
        x = torch.randn(rows, size).to(dtype)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                (row,) = seqkern.explain(ours, x).rows
                slower = _linear_backends.torch_outruns(rows, ours.weight, grad)
                assert (row.kind, row.backend) == ("seqkern.nn.Linear", "torch" if slower else "cpu")
                assert _linear_backends.torch_has_it(x, ours.weight) == bool(slower)
                with seqkern.backend("torch"):
                    assert seqkern.explain(ours, x).rows[0].backend == "torch"


def test_sixteen_rows_of_a_large_layer_are_ours_on_every_processor():
    for dtype in (torch.float32, torch.float64):
        assert _linear_backends.torch_outruns(16, torch.empty(LARGE, LARGE, dtype=dtype), False) is None


def test_state_copies_and_pickles():
    theirs, ours = pair(bias=True)
    assert list(ours.state_dict()) == list(theirs.state_dict()) and repr(ours) == repr(theirs)
    assert isinstance(ours, nn.Linear) and ours.in_features == 6 and ours.out_features == 7
    x = torch.randn(4, 6)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    for each in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(file, weights_only=False)):
        assert type(each) is seqkern.nn.Linear
        same(each(x), theirs(x))
    written = seqkern.nn.Linear(6, 7, bias=False, dtype=torch.float64)
    written.load_state_dict({"weight": theirs.weight.double()})
    same(written(x.double()), F.linear(x.double(), theirs.weight.double()))
    assert type(seqkern.restore(ours)) is nn.Linear


def test_what_is_swapped_in_a_model():
    class Low(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    class Own(nn.TransformerEncoderLayer):
        def forward(self, src, *args, **kwargs):
            return super().forward(src, *args, **kwargs)

    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.TransformerEncoderLayer(8, 2, 16),
        Own(8, 2, 16),
        Low(8, 8),
        nn.LazyLinear(4),
        nn.MultiheadAttention(8, 2),
        parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Identity()),
        torch.jit.script(nn.Linear(4, 4)),
    )
    rows = {row.name: row for row in seqkern.swaps(seqkern.accelerate(model))}
    swapped = ["0", "1", "1.self_attn", "2.self_attn", "2.linear1", "2.linear2", "5"]
    assert [name for name, row in rows.items() if row.after] == swapped
    for name, words in {
        "3": "own forward",
        "4": "sizes are not known",
        "6": "parametrized",
        "7": "scripted",
    }.items():
        assert words in rows[name].reason
    assert len(rows) == len(swapped) + 5 and type(model[1].linear1) is nn.Linear
    assert rows["0"].before == "torch.nn.Linear" and rows["0"].after == "seqkern.nn.Linear"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lazy modules
        model[4](torch.zeros(2, 8))
    assert type(seqkern.accelerate(model)[4]) is seqkern.nn.Linear
    seqkern.restore(model)
    assert not [row for row in seqkern.swaps(model) if row.after] and type(model[4]) is nn.Linear


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer)


OWNERS = {
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "weight_norm": weight_normed,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
    "tied": lambda layer: layer.register_parameter("weight", nn.Parameter(torch.randn(layer.weight.shape))),
    "no bias any more": lambda layer: setattr(layer, "bias", None),
    "transposed": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.T.contiguous().T)),
}


@pytest.mark.parametrize("size", [6, LARGE])
@pytest.mark.parametrize("name", OWNERS)
def test_what_owners_do_to_a_layer(name, size):
    theirs, ours = pair(size, size)
    for layer in (theirs, ours):
        torch.manual_seed(0)
        OWNERS[name](layer)
    x = torch.randn(ROWS, size)
    for grad in (True, False):
        for layer in (theirs, ours):
            layer.eval()
        with torch.set_grad_enabled(grad):
            same(ours(x), theirs(x))


def test_hooks_run_once():
    _, ours = pair(LARGE, LARGE)
    calls = []
    ours.register_forward_pre_hook(lambda module, args: calls.append("before"))
    ours.register_forward_hook(lambda module, args, output: calls.append("after"))
    ours.register_full_backward_hook(lambda module, inputs, outputs: calls.append("gradient"))
    ours(torch.randn(ROWS, LARGE, requires_grad=True)).sum().backward()
    with torch.no_grad():
        ours(torch.randn(ROWS, LARGE))
    assert calls == ["before", "after", "gradient", "before", "after"]


@pytest.mark.parametrize("size", [6, LARGE])
def test_traces_transforms_and_graphs(size):
    theirs, ours = pair(size, size)
    x = torch.randn(3, size)
    want = theirs(x)
    same(torch.fx.symbolic_trace(nn.Sequential(ours))(x), want)
    assert [node.op for node in torch.fx.symbolic_trace(nn.Sequential(ours)).graph.nodes][1] == "call_module"
    with torch.no_grad():
        same(torch.jit.trace(ours, x)(x), want.detach())
    same(torch.export.export(ours, (x,)).module()(x), want)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    for rows in (3, 5, 40):  # no rule of ours stands in the way of one graph for all
        compiled = torch.compile(ours, backend=keep, fullgraph=True, dynamic=True)
        same(compiled(torch.cat([x] * 14)[:rows]), theirs(torch.cat([x] * 14)[:rows]))
    assert len(graphs) == 1
    weights = {name: torch.stack([p, 2 * p]) for name, p in ours.state_dict().items()}
    many = torch.func.vmap(partial(torch.func.functional_call, ours), in_dims=(0, None))(weights, x)
    torch.testing.assert_close(many, torch.stack([want, 2 * want]), rtol=1e-4, atol=1e-4)
    _, moved = torch.func.jvp(ours, (x,), (x,))
    torch.testing.assert_close(moved, want - theirs.bias, rtol=1e-4, atol=1e-4)


def test_casts_and_other_devices():
    theirs, ours = pair(LARGE, LARGE)
    x = torch.randn(ROWS, LARGE)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(ours(x), theirs(x))
    with torch.inference_mode():
        same(ours(x), theirs(x))
    for move in (nn.Module.double, nn.Module.bfloat16, nn.Module.half):
        moved, want = move(copy.deepcopy(ours)), move(copy.deepcopy(theirs))
        at = x.to(moved.weight.dtype)
        same(moved(at), want(at), copy.deepcopy(want).double()(at.double()))
    assert copy.deepcopy(ours).to("meta")(x.to("meta")).shape == (ROWS, LARGE)
    assert nn.utils.skip_init(seqkern.nn.Linear, 6, 7)(torch.zeros(2, 6)).shape == (2, 7)


BAD = {
    "features": lambda _: torch.zeros(ROWS, 5),
    "dtype": lambda _: torch.zeros(ROWS, LARGE, dtype=torch.float64),
    "no dimension": lambda _: torch.zeros(()),
    "no tensor": lambda _: [[0.0] * LARGE] * ROWS,
    "device": lambda _: torch.zeros(ROWS, LARGE, device="meta"),
    "weight not there yet": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to("meta"))),
    "bias not there yet": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.to("meta"))),
    "bias of another size": lambda layer: setattr(layer, "bias", nn.Parameter(torch.zeros(LARGE + 1))),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_torchs(name):
    theirs, ours = pair(LARGE, LARGE)
    inputs = [BAD[name](layer) for layer in (theirs, ours)]
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            theirs_says, ours_says = (
                outcome(layer, torch.zeros(ROWS, LARGE) if x is None else x)
                for layer, x in zip((theirs, ours), inputs)
            )
            assert theirs_says == ours_says


def outcome(layer, x):
    """The kind of error, or where a result is: of a weight on meta torch computes one."""
    try:
        return layer(x).device
    except Exception as error:
        return type(error)


@pytest.fixture
def tried(monkeypatch):
    """The calls that went to the op without a second look."""
    calls = []

    def direct(*arguments):
        calls.append(arguments)
        return linear.direct_linear(*arguments)

    monkeypatch.setattr(linear_module, "direct_linear", direct)
    return calls


@pytest.mark.native
@pytest.mark.built
def test_the_short_way_is_for_plain_calls_without_a_gradient(tried):
    _, ours = pair(LARGE, LARGE)
    x = torch.randn(ROWS, LARGE)
    ours(x)
    with torch.no_grad():
        ours(x)
        assert len(tried) == 1
        with seqkern.backend("torch"):
            ours(x)
        with torch.autocast("cpu", torch.bfloat16):
            ours(x)
        with ByFunction() as seen:
            ours(x)
        assert seen.functions == [F.linear]  # as of torch's layer
        meta = copy.deepcopy(ours).to("meta")
        meta(x.to("meta"))
    assert len(tried) == 1


class ByFunction(TorchFunctionMode):
    def __init__(self):
        self.functions = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.functions.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.gpu
def test_a_gpus_layers_are_torchs(tried):
    theirs, ours = (layer.cuda() for layer in pair(LARGE, LARGE))
    x = torch.randn(ROWS, LARGE, device="cuda")
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    assert not tried


def test_what_was_swapped_within_a_layer_is_fast_listed_and_restored():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        want = copy.deepcopy(encoder)(x)
        encoder.apply(seqkern.accelerate)  # the parts first
        assert type(encoder.layers[0].linear1) is seqkern.nn.Linear
        same(encoder(x), want)
        assert is_plain(encoder.layers[0], 8)
    assert {"layers.0.linear1", "layers.0.linear2"} <= {row.name for row in seqkern.swaps(encoder)}
    seqkern.restore(encoder)
    assert not any(type(module).__module__.startswith("seqkern") for module in encoder.modules())


def test_a_layer_that_is_not_swapped_has_its_linear_layers_swapped():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    layer.forward = lambda *args: nn.TransformerEncoderLayer.forward(layer, *args)
    model = nn.ModuleDict(
        {"head": layer.linear2, "layer": layer, "own": nn.TransformerDecoderLayer(8, 2, 16)}
    )
    swapped = {row.name for row in seqkern.swaps(seqkern.accelerate(model)) if row.after}
    assert swapped == {
        "head",
        "layer.linear1",
        "layer.self_attn",
        "own",
        "own.self_attn",
        "own.multihead_attn",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_input_that_torch_copies_may_be_written_to(dtype):
    theirs, ours = pair(40, 40, dtype)
    start = torch.randn(20, 4, 40).to(dtype).requires_grad_()
    found = []
    for layer in (theirs, ours):
        x = (start * 1).transpose(0, 1)
        x += layer(x)
        found.append(torch.autograd.grad(x.square().sum(), [start, *layer.parameters()]))
    for got, want in zip(found[1], found[0]):
        same(got, want)


def test_modes_see_the_operators_of_torchs_layer():
    _, ours = pair(LARGE, LARGE, torch.bfloat16)
    x = torch.randn(ROWS, LARGE, dtype=torch.bfloat16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
            ours(x)
        assert counter.get_total_flops() == 2 * ROWS * LARGE**2


@pytest.mark.filterwarnings("ignore")  # torch.ao's, of its end
def test_what_was_prepared_for_quantization_is_left_alone():
    model = nn.Sequential(
        torch.ao.quantization.QuantStub(), nn.Linear(8, 8), torch.ao.quantization.DeQuantStub()
    )
    model.eval().qconfig = torch.ao.quantization.default_qconfig
    x = torch.randn(4, 8)
    torch.ao.quantization.prepare(model, inplace=True)(x)
    (row,) = (row for row in seqkern.swaps(seqkern.accelerate(model)) if row.name == "1")
    assert row.after is None and "torch.ao" in row.reason
    assert torch.ao.quantization.convert(model)(x).shape == (4, 8)
