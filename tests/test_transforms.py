"""Compilers and function transforms: no graph breaks, no silent zeros."""

import io
import subprocess
import sys

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import seqkern
from seqkern.ops import _library, _linear_backends
from seqkern.spec import CELLS, layer, step

NATIVE = _library.native()
CPU = [f"cpu-{isa}" for isa in NATIVE.isas()] if NATIVE else []
LAYERS = [("LSTM", {}), ("LSTM", {"proj_size": 2}), ("GRU", {}), ("RNN", {})]
MODULES = [*LAYERS, ("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {})]
I, H, B, T = 3, 4, 2, 3


def make(kind, options, dtype=torch.float64, **more):
    theirs = getattr(torch.nn, kind)(I, H, dtype=dtype, **options, **more)
    ours = getattr(seqkern.nn, kind)(I, H, dtype=dtype, **options, **more)
    ours.load_state_dict(theirs.state_dict())
    lead = (B,) if kind.endswith("Cell") else (T, B)
    return theirs, ours, torch.randn(*lead, I, dtype=dtype)


def first(found):
    return found if isinstance(found, torch.Tensor) else first(found[0])


def close(a, b, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_gradients_by_transform(kind, options):
    theirs, ours, x = make(kind, options)
    params = dict(ours.named_parameters())

    def loss(module):
        return lambda p: first(functional_call(module, p, (x,))).square().sum()

    want = torch.autograd.grad(loss(theirs)(dict(theirs.named_parameters())), list(theirs.parameters()))
    for got in (grad(loss(ours))(params), jacrev(loss(ours))(params), jacfwd(loss(ours))(params)):
        for a, b in zip(got.values(), want, strict=True):
            close(a, b)
        assert got["weight_ih" if kind.endswith("Cell") else "weight_ih_l0"].any()


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_forward_mode(kind, options):
    _, ours, x = make(kind, options)
    tangent = torch.randn_like(x)
    f = lambda x: first(ours(x))  # noqa: E731
    _, along = jvp(f, (x,), (tangent,))
    close(along, (f(x + 1e-6 * tangent) - f(x - 1e-6 * tangent)).detach() / 2e-6, 1e-4, 1e-6)
    assert along.any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        close(torch.autograd.forward_ad.unpack_dual(f(dual)).tangent, along)


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_vmap(kind, options):
    theirs, ours, x = make(kind, options)
    xs = torch.stack((x, 2 * x, -x))
    close(vmap(lambda x: first(ours(x)))(xs), torch.stack([first(theirs(x)) for x in xs]))
    per_sample = vmap(grad(lambda x: first(ours(x)).square().sum()))(xs)
    for each, x in zip(per_sample, xs, strict=True):
        x = x.clone().requires_grad_()
        close(each, torch.autograd.grad(first(ours(x)).square().sum(), x)[0])


@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_hessian(kind, options):
    _, ours, x = make(kind, options)
    f = lambda x: first(ours(x)).square().sum()  # noqa: E731
    by_transform = hessian(f)(x)
    by_backward = torch.autograd.functional.hessian(f, x)
    close(by_transform, by_backward, 1e-7, 1e-9)
    assert by_transform.any()


# torch's fused kernels have no second derivative in every build
@pytest.mark.parametrize("run_on", ["reference", *CPU], indirect=True)
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_second_derivatives(run_on, kind, options):
    _, ours, x = make(kind, options)
    x = x.requires_grad_()
    names = list(dict(ours.named_parameters()))
    run = lambda x, *p: first(functional_call(ours, dict(zip(names, p, strict=True)), (x,)))  # noqa: E731
    inputs = (x, *(p.detach().requires_grad_() for p in ours.parameters()))
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", [c for c in CELLS if c != "rnn_relu"])
def test_spec_gradcheck(cell, packed, bidirectional):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    sizes = torch.tensor([2, 2, 1]) if packed else None
    rows = (5,) if packed else (T, B)
    gates, proj = CELLS[cell].gates, 3 if cell == "lstm" else H
    D = 1 + bidirectional
    one = [leaf(gates * H, I), leaf(gates * H, proj), leaf(gates * H), leaf(gates * H)]
    one += [leaf(proj, H)] if cell == "lstm" else []
    two = [w.detach().clone().requires_grad_() for w in one] if bidirectional else []
    states = [leaf(D, B, proj)] + ([leaf(D, B, H)] if cell == "lstm" else [])

    def run(x, *rest):
        s, w = rest[: len(states)], rest[len(states) :]
        mine, other = list(w[: len(one)]), list(w[len(one) :])
        pad = [] if cell == "lstm" else [None]
        back = [*other, *pad] if bidirectional else None
        found = layer(cell, x, sizes, s[0], s[1] if len(s) > 1 else None, [*mine, *pad], back)
        return tuple(t for t in found if t is not None)

    inputs = (leaf(*rows, I), *states, *one, *two)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)


def test_spec_step_is_a_scan_of_one():
    for cell, (_, gates, states) in CELLS.items():
        x, h, c = torch.randn(B, I), torch.randn(B, H), torch.randn(B, H)
        weights = [torch.randn(gates * H, I), torch.randn(gates * H, H), None, None, None]
        found = step(cell, x, (h, c)[:states], weights)
        output, h_n, c_n = layer(cell, x[None], None, h[None], c[None] if states == 2 else None, weights)
        close(output[0], found[0], 1e-6, 1e-6)
        assert torch.equal(h_n[0], output[0])
        assert c_n is None or torch.allclose(c_n[0], found[1])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("forced", [None, "reference"])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_compile_without_a_graph_break(kind, options, forced):
    theirs, ours, x = make(kind, options, torch.float32)
    with seqkern.backend(forced):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            got, want = first(compiled(a)), first(theirs(b))
            close(got, want, 1e-4, 1e-5)
            got.square().sum().backward()
            want.square().sum().backward()
            close(a.grad, b.grad, 1e-4, 1e-5)
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                close(p.grad, q.grad, 1e-4, 1e-5)
        with torch.no_grad():
            close(first(compiled(x)), first(theirs(x)), 1e-4, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.built
def test_compile_takes_any_length_and_stacks():
    theirs, ours, _ = make("LSTM", {}, torch.float32, num_layers=2, bidirectional=True, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5, 9):
        x = torch.randn(2, n, I)
        close(first(compiled(x)), first(theirs(x)), 1e-4, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.built
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_training_compiles_once_for_all_lengths(kind):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(getattr(seqkern.nn, kind)(I, H), fullgraph=True, dynamic=True, backend=count)
    for n in range(3, 15):
        first(compiled(torch.randn(n, 2, I))).sum().backward()
    assert len(graphs) <= 2


@pytest.mark.built
def test_export_in_training_takes_any_length():
    length = torch.export.Dim("length", min=2, max=100)
    exported = torch.export.export(
        seqkern.nn.GRU(I, H), (torch.randn(5, 2, I),), dynamic_shapes={"input": {0: length}}
    )
    assert exported.module()(torch.randn(9, 2, I))[0].shape == (9, 2, H)


@pytest.mark.built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_output_may_be_written_in_place(kind, dtype):
    theirs, ours, x = make(kind, {}, dtype)
    grads = []
    for module in (theirs.double(), ours):
        output = first(module(x.to(next(module.parameters()).dtype)))
        (output.relu() if module is theirs else output.relu_()).sum().backward()
        grads.append([p.grad for p in module.parameters()])
    for mine, its in zip(*reversed(grads), strict=True):
        torch.testing.assert_close(mine.double(), its, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiled_under_autocast_has_torchs_dtype(kind):
    theirs, ours, x = make(kind, {}, torch.float32)
    raises = (
        kind == "LSTM" and torch.bfloat16 in _linear_backends.TERM_BY_TERM
    )  # torch's own, on this processor
    with torch.autocast("cpu", torch.bfloat16):
        dtype = torch.bfloat16 if raises else first(theirs(x)).dtype
        assert first(torch.compile(ours, backend="aot_eager")(x)).dtype == dtype


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.built
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compile_packed_with_a_state(kind):
    theirs, ours, _ = make(kind, {}, torch.float32)
    data, sizes = torch.randn(6, I), torch.tensor([3, 2, 1])
    h = torch.randn(1, 3, H)
    state = (h, h.clone()) if kind == "LSTM" else h

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(data, sizes, state, weights):
        if kind == "RNN":
            return seqkern.functional.rnn(data, state, weights, batch_sizes=sizes)[0]
        return getattr(seqkern.functional, kind.lower())(data, state, weights, batch_sizes=sizes)[0]

    packed = torch.nn.utils.rnn.PackedSequence(data, sizes)
    close(run(data, sizes, state, list(ours.parameters())), theirs(packed, state)[0].data, 1e-4, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.built
@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compile_packed_without_a_state(kind, in_order):
    theirs, ours, _ = make(kind, {}, torch.float32)
    run = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for lengths in ((2, 5), (4, 6, 1), (3,)):
        sequences = [torch.randn(n, I) for n in (sorted(lengths, reverse=True) if in_order else lengths)]
        packed = torch.nn.utils.rnn.pack_sequence(sequences, enforce_sorted=in_order)
        (got, state), (want, its_state) = run(packed), theirs(packed)
        close(got.data, want.data, 1e-4, 1e-5)
        for mine, its in zip(state, its_state, strict=True):
            close(mine, its, 1e-4, 1e-5)
        grads = [
            torch.autograd.grad(x.data.sum(), list(m.parameters())) for x, m in ((got, ours), (want, theirs))
        ]
        for mine, its in zip(*grads, strict=True):
            close(mine, its, 1e-4, 1e-5)


@pytest.mark.built
def test_export_of_packed_input():
    theirs, ours, _ = make("LSTM", {}, torch.float32)
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, I) for n in (2, 5)], enforce_sorted=False)
    program = torch.export.export(ours.eval(), (packed,), strict=False)
    close(first(program.module()(packed)).data, first(theirs(packed)).data, 1e-4, 1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("kind", "options"), MODULES)
def test_export(kind, options, strict):
    theirs, ours, x = make(kind, options, torch.float32)
    program = torch.export.export(ours.eval(), (x,), strict=strict)
    close(first(program.module()(x)), first(theirs(x)), 1e-4, 1e-5)
    if NATIVE:
        assert "seqkern.rnn_forward" in str(program.graph)


@pytest.mark.built
def test_an_exported_graph_trains_right():
    theirs, ours, x = make("GRU", {}, torch.float32)
    program = torch.export.export(ours, (x,)).module()
    first(program(x)).square().sum().backward()
    first(theirs(x)).square().sum().backward()
    for (_, a), b in zip(
        sorted(program.named_parameters()), [p for _, p in sorted(theirs.named_parameters())]
    ):
        close(a.grad, b.grad, 1e-4, 1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell"])
def test_inductor(kind):
    theirs, ours, x = make(kind, {}, torch.float32)
    compiled = torch.compile(ours, fullgraph=True)
    close(first(compiled(x)), first(theirs(x)), 1e-4, 1e-5)
    first(compiled(x)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_vmap_of_grad():
    _, ours, x = make("GRUCell", {})
    f = vmap(grad(lambda x: first(ours(x)).square().sum()))
    close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))


TRACED = {
    "LSTM": (lambda: seqkern.nn.LSTM(4, 4), (5, 2, 4)),
    "GRUCell": (lambda: seqkern.nn.GRUCell(4, 4), (2, 4)),
    "TransformerEncoderLayer": (lambda: seqkern.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), (5, 2, 8)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # pytest's filters come before ours
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", TRACED)
def test_a_trace_can_be_saved(name, grad):
    module, x = TRACED[name][0](), torch.randn(TRACED[name][1])
    with torch.set_grad_enabled(grad):
        traced, file = torch.jit.trace(module, (x,)), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        x = torch.randn_like(x)
        torch.testing.assert_close(torch.jit.load(file)(x), module(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["trace", "trace with a gradient", "export", "make_fx"])
@pytest.mark.parametrize("name", TRACED)
def test_a_graph_made_without_gradients_can_be_trained(name, how):
    module, x = TRACED[name][0](), torch.randn(TRACED[name][1])
    with torch.set_grad_enabled("with" in how):
        if how == "export":
            graph = torch.export.export(module, (x,)).module()
        elif how == "make_fx":
            graph = make_fx(module)(x)
        else:
            graph = torch.jit.trace(module, (x,))
    given = [x.clone().requires_grad_() for _ in range(2)]
    found = [torch.autograd.grad(first(f(y)).square().sum(), y) for f, y in zip((graph, module), given)]
    torch.testing.assert_close(*found)


def exported(module, inputs, **options):
    """The ONNX model of a module, as a function of the same inputs in ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript" if options["dynamo"] else "onnx")
    file = io.BytesIO()
    torch.onnx.export(module, inputs, file, **options)
    session = ort.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    def run(*inputs):
        feeds = {each.name: x.numpy() for each, x in zip(session.get_inputs(), inputs)}
        return torch.from_numpy(session.run(None, feeds)[0])

    return run


@pytest.mark.filterwarnings("ignore")  # of torch's exporters, many
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", [*TRACED, "TransformerDecoderLayer"])
def test_onnx_gets_torchs_operators(name, dynamo):
    if name in TRACED:
        module, inputs = TRACED[name][0]().eval(), (torch.randn(TRACED[name][1]),)
    else:
        module, inputs = seqkern.nn.TransformerDecoderLayer(8, 2, 16).eval(), (torch.randn(5, 2, 8),) * 2
    with torch.no_grad():
        close(exported(module, inputs, dynamo=dynamo)(*inputs), first(module(*inputs)), 1e-4, 1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "TransformerEncoder"])
def test_onnx_with_a_batch_of_any_size(name):
    if name == "TransformerEncoder":
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        module = seqkern.accelerate(torch.nn.TransformerEncoder(layer, 2)).eval()
    else:
        module = getattr(seqkern.nn, name)(8, 8, 2, batch_first=True, bidirectional=True)
    sizes = ({0: torch.export.Dim("batch")},)
    run = exported(module, (torch.randn(3, 5, 8),), dynamo=True, dynamic_shapes=sizes)
    x = torch.randn(7, 5, 8)
    with torch.no_grad():
        close(run(x), first(module(x)), 1e-4, 1e-5)


class OfMany(torch.nn.Module):
    """Every module that is swapped, called as people call them."""

    def __init__(self):
        super().__init__()
        nn = torch.nn
        self.lstm, self.gru, self.cell = nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8), nn.GRUCell(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.whole = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

    def forward(self, x):
        x = self.gru(self.lstm(x)[0])[0]
        x, _ = self.attention(x, key=x, value=x)
        x = self.layer(self.encoder(src=x), memory=x)
        return self.cell(self.whole(x, tgt=x)[:, 0])


def test_fx_takes_modules_as_torchs():
    model = OfMany().eval()
    want = torch.fx.symbolic_trace(model)
    graph = torch.fx.symbolic_trace(seqkern.accelerate(model))
    assert [(n.op, n.target) for n in graph.graph.nodes] == [(n.op, n.target) for n in want.graph.nodes]
    x = torch.randn(2, 5, 8)
    assert torch.equal(graph(x), model(x))


class Doubled(seqkern.nn.GRU):
    def forward(self, input, hx=None):
        return super().forward(2 * input, hx)


def test_fx_never_records_half_of_a_call():
    hooked = seqkern.nn.TransformerEncoderLayer(8, 2, 16)
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    for module in (Doubled(8, 8), hooked):
        with pytest.raises(Exception, match=r"Proxy|symbolically traced"):
            torch.fx.symbolic_trace(torch.nn.Sequential(module))
    with pytest.raises(Exception, match=r"Proxy|symbolically traced"):
        torch.fx.symbolic_trace(seqkern.nn.GRU(8, 8))  # nothing that it could be a call of

    class Remembers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = seqkern.nn.TransformerDecoderLayer(8, 2, 16).eval()
            self.start = torch.nn.Parameter(torch.zeros(1, 2, 8))

        def forward(self, memory):
            return self.layer(torch.zeros(1, 2, 8), memory)

    model, memory = Remembers(), torch.randn(3, 2, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(memory), model(memory))


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # of torch's own looking
@pytest.mark.parametrize("name", TRACED)
def test_compiled_autograd_follows_the_backwards(name):
    module, x = TRACED[name][0](), torch.randn(TRACED[name][1])

    def gradients():
        module.zero_grad()
        first(module(x)).square().sum().backward()
        return [p.grad.clone() for p in module.parameters()]

    want = gradients()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        got = gradients()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", TRACED)
def test_gradients_enabled_in_inference_mode_make_no_graph(name):
    module, x = TRACED[name][0](), torch.randn(TRACED[name][1], requires_grad=True)
    with torch.inference_mode(), torch.enable_grad():
        found = first(module(x))
    assert not found.requires_grad


def test_traces_warn_no_more_than_torchs():
    """Outside of pytest, which sets filters of its own."""
    code = (
        "import torch, seqkern, warnings\n"
        "warnings.simplefilter('error', append=True)\n"
        "torch.jit.trace(seqkern.nn.TransformerEncoderLayer(8, 2, 16).eval(), torch.randn(3, 2, 8))\n"
        "torch.jit.trace(seqkern.nn.GRU(4, 4), torch.randn(3, 2, 4), check_trace=False)\n"
    )
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
