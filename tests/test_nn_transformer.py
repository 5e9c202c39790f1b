"""seqkern.nn's Transformer modules against torch.nn's: layers and stacks, train and eval, nested tensors, swaps."""

import copy
import itertools
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrize

import seqkern
from seqkern.ops import _backend
from seqkern.testing import relative_rms, tolerance, worst

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),  # torch's
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True, but self.use_nested_tensor is False"),
]
E, H, FF, B, S, T = 8, 2, 12, 3, 5, 4
SWITCHES = ("norm_first", "batch_first", "bias")
ACTIVATIONS = itertools.cycle(("relu", torch.tanh, "gelu"))
OPTIONS = [
    {**dict(zip(SWITCHES, each)), "activation": next(ACTIVATIONS)}
    for each in itertools.product((False, True), repeat=3)
]
CAUSAL = {n: torch.ones(n, n).triu(1).bool() for n in (S, T)}
PADDING = torch.arange(S) >= torch.tensor([5, 2, 4])[:, None]
KINDS = ("TransformerEncoderLayer", "TransformerDecoderLayer", "encoder", "decoder", "Transformer")
# For each kind the masks of its calls, in its own words; "" stands for causal, "p" for padding.
CALLS = {
    "TransformerEncoderLayer": [
        {},
        {"src_mask": "c"},
        {"src_key_padding_mask": "p"},
        {"src_mask": "c", "is_causal": 1},
    ],
    "encoder": [
        {},
        {"mask": "c"},
        {"src_key_padding_mask": "p"},
        {"mask": "c", "src_key_padding_mask": "p", "is_causal": 1},
        {"mask": "f", "src_key_padding_mask": "fp"},
    ],
    "TransformerDecoderLayer": [{}, {"tgt_mask": "c", "tgt_is_causal": 1, "memory_key_padding_mask": "p"}],
    "decoder": [{}, {"tgt_mask": "c"}, {"tgt_mask": "f", "memory_key_padding_mask": "p"}],
    "Transformer": [
        {},
        {"tgt_mask": "c", "src_key_padding_mask": "p", "memory_key_padding_mask": "p"},
        {"tgt_mask": "f", "tgt_is_causal": 1, "src_mask": "c"},
    ],
}


def named(options):
    return "-".join(str(getattr(v, "__name__", v)) for v in options.values())


def build(room, kind, dtype=torch.float32, dropout=0.0, seed=1, **options):
    torch.manual_seed(seed)
    given = {"dim_feedforward": FF, "dropout": dropout, "dtype": dtype, **options}
    if kind == "Transformer":
        return room.Transformer(E, H, 2, 2, **given)
    if kind in ("encoder", "decoder"):
        stack = getattr(room, f"Transformer{kind.title()}")
        layer = getattr(room, f"Transformer{kind.title()}Layer")(E, H, **given)
        return stack(layer, 2, nn.LayerNorm(E, dtype=dtype))
    return getattr(room, kind)(E, H, **given)


def inputs_of(kind, dtype=torch.float32, batch_first=False, **_):
    found = [torch.randn(S, B, E, dtype=dtype), torch.randn(T, B, E, dtype=dtype)]
    found = [x.transpose(0, 1) for x in found] if batch_first else found
    return found[:1] if "ncoder" in kind else found if kind == "Transformer" else found[::-1]


def masks_of(call, dtype):
    def mask(name, word):
        if word == 1:
            return True
        found = PADDING if word.endswith("p") else CAUSAL[T if name.startswith("tgt") else S]
        return (
            torch.zeros(found.shape, dtype=dtype).masked_fill(found, -torch.inf) if word[0] == "f" else found
        )

    return {name: mask(name, word) for name, word in call.items()}


def results(module, inputs, call, dtype):
    """Output and all gradients, in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    output = module(*leaves, **masks_of(call, dtype))
    generator = torch.Generator().manual_seed(1)
    sent = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
    wanted = dict(enumerate(leaves)) | dict(module.named_parameters())
    grads = torch.autograd.grad(output, list(wanted.values()), sent)
    return {"output": output.detach()} | {f"d {k}": g for k, g in zip(wanted, grads)}


def hold(got, theirs, exact, dtype, layers=1):
    for name, true in exact.items():
        assert (got[name].shape, got[name].dtype) == (theirs[name].shape, theirs[name].dtype), name
        error = relative_rms(got[name], true)
        allowed = tolerance(dtype, relative_rms(theirs[name], true), layers)
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g} at {worst(got[name], true)}"


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torch(kind, options):
    theirs, ours = (build(room, kind, **options) for room in (nn, seqkern.nn))
    inputs = inputs_of(kind, **options)
    for call in CALLS[kind]:
        exact = results(theirs, inputs, call, torch.float64)
        hold(results(ours, inputs, call, torch.float64), exact, exact, torch.float64, layers=8)
        want = results(theirs, inputs, call, torch.float32)
        hold(results(ours, inputs, call, torch.float32), want, exact, torch.float32, layers=8)


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_eval_as_torch(kind, options):
    """Where torch takes its native path and packs padded sequences, which leaves zeros at their ends."""
    theirs, ours = (build(room, kind, torch.float64, **options).eval() for room in (nn, seqkern.nn))
    inputs = inputs_of(kind, torch.float64, **options)
    for call in CALLS[kind]:
        masks = masks_of(call, torch.float64)
        with _backend.watch() as seen:
            got = ours(*inputs, **masks)
        assert seen, "attention went past seqkern"
        torch.testing.assert_close(got, theirs(*inputs, **masks), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence(kind):
    theirs, ours = (build(room, kind, torch.float64) for room in (nn, seqkern.nn))
    inputs = [x[:, 0] for x in inputs_of(kind, torch.float64)]
    torch.testing.assert_close(ours(*inputs), theirs(*inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_constructor_and_state_dict_are_torchs(kind):
    theirs, ours = (build(room, kind, dropout=0.1) for room in (nn, seqkern.nn))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs))
    assert all(row.reason == "already a seqkern module" for row in seqkern.swaps(ours))
    inputs = inputs_of(kind)
    ours.eval()
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours) and torch.equal(twin(*inputs), ours(*inputs))


@pytest.mark.parametrize(
    ("args", "kwargs"), [((7, 2), {}), ((8, 2, 12, 2.0), {}), ((8, 2), {"activation": "elu"}), ((8,), {})]
)
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_constructor_errors_are_torchs(kind, args, kwargs):
    with pytest.raises(Exception) as expected:
        getattr(nn, kind)(*args, **kwargs)
    with pytest.raises(expected.type):
        getattr(seqkern.nn, kind)(*args, **kwargs)


def test_a_mask_of_integers_is_an_error_of_torchs_type():
    for room in (nn, seqkern.nn):
        with pytest.raises(AssertionError, match="bool"):
            build(room, "encoder")(*inputs_of("encoder"), torch.zeros(S, S, dtype=torch.int64))


@pytest.mark.parametrize("training", [True, False])
def test_a_causal_mask_of_another_length_is_torchs_error(training):
    """As of an input whose batch stands first, where the module takes it second."""
    x, mask = torch.randn(2, S + 1, E), nn.Transformer.generate_square_subsequent_mask(S + 1)
    for room in (nn, seqkern.nn):
        for kind, inputs in (("encoder", (x,)), ("decoder", (x, x))):
            model = build(room, kind).train(training)
            with pytest.raises(RuntimeError, match=r"shape|expected"):
                model(*inputs, mask)
        with pytest.raises(RuntimeError, match=r"shape|expected"):
            build(room, "Transformer").train(training)(x, x, tgt_mask=mask)
        with pytest.raises(RuntimeError, match=r"shape|expected"):
            build(room, "encoder", batch_first=True).train(training)(x, torch.zeros(1, 1))


def test_transformer_errors_are_torchs():
    for room in (nn, seqkern.nn):
        model = build(room, "Transformer")
        with pytest.raises(RuntimeError, match="batch number"):
            model(torch.zeros(S, 2, E), torch.zeros(T, 3, E))
        with pytest.raises(RuntimeError, match="feature number"):
            model(torch.zeros(S, 2, E + 1), torch.zeros(T, 2, E))


def test_custom_parts_stay():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H), 1)
    model = seqkern.nn.Transformer(E, H, custom_encoder=encoder, num_decoder_layers=1)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0].multihead_attn) is seqkern.nn.MultiheadAttention


def test_dropout():
    ours = build(seqkern.nn, "TransformerEncoderLayer", dropout=0.3, batch_first=True)
    theirs = build(nn, "TransformerEncoderLayer", dropout=0.3, batch_first=True)
    x = torch.randn(2, S, E)
    torch.manual_seed(7)
    first = ours(x)
    torch.manual_seed(7)
    assert torch.equal(first, ours(x))
    assert not torch.equal(first, ours(x))
    with torch.no_grad():
        mine, other = (torch.stack([m(x) for _ in range(800)]) for m in (ours, theirs))
    torch.testing.assert_close(mine.mean(0), other.mean(0), rtol=0.1, atol=0.15)
    torch.testing.assert_close(mine.std(0), other.std(0), rtol=0.2, atol=0.1)


FORCED = ["reference", pytest.param("cpu", marks=pytest.mark.built)]


@pytest.mark.parametrize("backend", [None, *FORCED])
@pytest.mark.parametrize("norm_first", [False, True])
@torch.no_grad()
def test_inside_torchs_own_encoder(norm_first, backend):
    """torch hands our layers nested tensors in place of padded sequences, and gets nested tensors back."""
    mine = build(seqkern.nn, "TransformerEncoderLayer", batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(mine, 2).eval()
    theirs = build(nn, "encoder", batch_first=True, norm_first=norm_first).eval()
    theirs.norm = None
    theirs.load_state_dict(encoder.state_dict())
    x = torch.randn(B, S, E)
    for masks in ({"src_key_padding_mask": PADDING}, {"mask": CAUSAL[S]}, {}):
        with _backend.watch() as seen, seqkern.backend(backend):
            got = encoder(x, **masks)
        assert len(seen) == 2
        torch.testing.assert_close(got, theirs(x, **masks), rtol=1e-4, atol=1e-5)


class Pair(nn.Module):
    """A model as people write them: embeddings, a Transformer, an attention of its own."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.embedding = nn.Embedding(11, E)
        self.transformer = nn.Transformer(E, H, 1, 1, FF, dropout, batch_first=True)
        self.pool = nn.MultiheadAttention(E, H, dropout, batch_first=True)

    def forward(self, source, target):
        x = self.transformer(self.embedding(source), self.embedding(target))
        return self.pool(x[:, :1], x, x)[0]


SWAPPED = [
    "transformer",
    "transformer.encoder",
    "transformer.encoder.layers.0",
    "transformer.encoder.layers.0.self_attn",
    "transformer.decoder",
    "transformer.decoder.layers.0",
    "transformer.decoder.layers.0.self_attn",
    "transformer.decoder.layers.0.multihead_attn",
    "pool",
]


def test_a_model_is_swapped_and_restored():
    model = Pair().eval()
    numbers = torch.randint(11, (B, S)), torch.randint(11, (B, T))
    parameters = list(model.parameters())
    before = [type(m) for m in model.modules()]
    want = model(*numbers)
    assert seqkern.accelerate(model) is model
    rows = seqkern.swaps(model)
    assert [row.name for row in rows] == SWAPPED
    assert all(row.after == row.before.replace("torch.nn", "seqkern.nn") for row in rows)
    torch.testing.assert_close(model(*numbers), want, rtol=1e-4, atol=1e-5)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    names = {row.name for row in seqkern.explain(model, *numbers).rows}
    assert names == {name for name in SWAPPED if name.endswith("attn") or name == "pool"}
    assert [type(m) for m in seqkern.restore(model).modules()] == before
    assert torch.equal(model(*numbers), want)


@pytest.mark.parametrize("training", [True, False])
def test_verify(training):
    result = seqkern.verify(Pair().train(training), torch.randint(11, (B, S)), torch.randint(11, (B, T)))
    assert result.ok
    assert bool(result.dropout) is training
    assert {"output", "d pool.in_proj_weight"} <= {row.name for row in result.rows}


class OwnForward(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(src, src_mask, src_key_padding_mask, is_causal) + 1


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) + 1


@pytest.mark.parametrize(
    ("kind", "why"), [(OwnForward, "its own forward"), (OwnBlock, "class would be lost")]
)
def test_a_subclass_is_left_alone_and_explained_as_it_runs(kind, why):
    """Its attention is swapped; in eval mode torch's native layer runs past it, and `explain` must say so."""
    model = nn.Sequential(kind(E, H, FF, 0.0, batch_first=True)).eval()
    x = torch.randn(B, S, E)
    with torch.no_grad():
        want = model(x)
        seqkern.accelerate(model)
        rows = {row.name: row for row in seqkern.swaps(model)}
        assert why in rows["0"].reason and rows["0.self_attn"].after
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
        (row,) = seqkern.explain(model, x).rows
        assert (row.name, row.backend) == ("0", "torch")
    rows = seqkern.explain(model, x).rows
    assert {(row.name, row.kind) for row in rows} >= {("0.self_attn", "seqkern.nn.MultiheadAttention")}


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


MADE = {
    "attention": (lambda: nn.MultiheadAttention(E, H), "in_proj_weight", lambda m, x: m(x, x, x)[0]),
    "gru": (lambda: nn.GRU(E, E), "weight_hh_l0", lambda m, x: m(x)[0]),
    "cell": (lambda: nn.GRUCell(E, E), "weight_hh", lambda m, x: m(x[0])),
}


@pytest.mark.parametrize("name", MADE)
def test_parametrized_after_the_swap(name):
    """It runs on seqkern still: swaps, explain and restore agree on that."""
    make, weight, call = MADE[name]
    layer, x = make(), torch.randn(S, B, E)
    plain = copy.deepcopy(layer)
    model = seqkern.accelerate(nn.Sequential(layer))
    parametrize.register_parametrization(layer, weight, Double())
    (row,) = seqkern.swaps(model)
    assert (row.before, row.after, row.reason) == (
        f"torch.nn.{type(plain).__name__}",
        f"seqkern.nn.{type(plain).__name__}",
        "",
    )
    with torch.no_grad(), seqkern.backend("reference"):
        (told,) = seqkern.explain(
            layer, *([x] * 3 if name == "attention" else [x[0] if name == "cell" else x])
        ).rows
    assert (told.kind, told.backend) == (row.after, "reference")
    got = call(layer, x)
    twin = seqkern.restore(copy.deepcopy(model))
    assert seqkern.restore(model) is model
    for each in (model[0], twin[0]):
        assert isinstance(each, type(plain)) and not isinstance(
            each, type(getattr(seqkern.nn, type(plain).__name__))
        )
        assert parametrize.is_parametrized(each)
        torch.testing.assert_close(call(each, x), got, rtol=1e-4, atol=1e-5)
    (row,) = seqkern.swaps(model)
    assert row.after is None and "parametrized" in row.reason
    parametrize.remove_parametrizations(layer, weight, leave_parametrized=False)
    assert type(layer) is type(plain)
    torch.testing.assert_close(call(layer, x), call(plain, x))
    assert seqkern.swaps(seqkern.accelerate(model))[0].after


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("kind", "norm_first"), [("encoder", True), ("decoder", False)])
def test_compile_without_a_graph_break(kind, norm_first):
    theirs, ours = (build(room, kind, norm_first=norm_first) for room in (nn, seqkern.nn))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    inputs = inputs_of(kind)
    for call in CALLS[kind]:
        masks, found = masks_of(call, torch.float32), []
        for module in (compiled, theirs):
            given = [x.clone().requires_grad_() for x in inputs]
            output = module(*given, **masks)
            found.append([output, *torch.autograd.grad(output.square().sum(), given)])
        for mine, other in zip(*found):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_export(kind, strict):
    theirs, ours = (build(room, kind, batch_first=True).eval() for room in (nn, seqkern.nn))
    inputs = tuple(inputs_of(kind, batch_first=True))
    program = torch.export.export(ours, inputs, strict=strict)
    torch.testing.assert_close(program.module()(*inputs), theirs(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_as_torch(kind):
    theirs, ours = (build(room, kind, batch_first=True) for room in (nn, seqkern.nn))
    inputs = inputs_of(kind, batch_first=True)
    exact = copy.deepcopy(theirs).double()(*(x.double() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = ours(*inputs), theirs(*inputs)
    assert got.dtype == want.dtype
    allowed = tolerance(torch.bfloat16, relative_rms(want, exact), layers=2)
    assert relative_rms(got, exact) <= allowed


@pytest.mark.parametrize("kind", KINDS)
def test_transforms(kind):
    theirs, ours = (build(room, kind, torch.float64) for room in (nn, seqkern.nn))
    first, *rest = inputs_of(kind, torch.float64)
    tangent, params = torch.randn_like(first), dict(ours.named_parameters())

    def loss(module):
        return lambda p: functional_call(module, p, (first, *rest)).square().sum()

    want = torch.autograd.grad(loss(theirs)(dict(theirs.named_parameters())), list(theirs.parameters()))
    for mine, other in zip(grad(loss(ours))(params).values(), want, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)
    _, along = jvp(lambda x: ours(x, *rest), (first,), (tangent,))
    ahead, behind = (ours(first + h * tangent, *rest) for h in (1e-6, -1e-6))
    torch.testing.assert_close(along, (ahead - behind).detach() / 2e-6, rtol=1e-4, atol=1e-6)
    xs = torch.stack((first, 2 * first))
    got = vmap(lambda x: ours(x, *rest))(xs)
    torch.testing.assert_close(got, torch.stack([theirs(x, *rest) for x in xs]), rtol=1e-8, atol=1e-10)


@torch.no_grad()
def test_padding_in_a_transform_is_not_packed():
    encoder = seqkern.nn.TransformerEncoder(
        seqkern.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 2, 4])[:, None]
    got = vmap(lambda x, padding: encoder(x[None], src_key_padding_mask=padding[None])[0])(x, padding)
    want = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], want[~padding])


@pytest.mark.parametrize("backend", FORCED)  # torch's own kernel has no second derivative
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
def test_second_derivatives(kind, backend):
    ours = build(seqkern.nn, kind, torch.float64, activation=torch.tanh)
    inputs = tuple(x[:2, :1].clone().requires_grad_() for x in inputs_of(kind, torch.float64))
    with seqkern.backend(backend):
        assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


RANK = """
    import sys
    import torch, seqkern
    import torch.distributed as dist
    from torch import nn

    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    plain = nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True)
    src, tgt = torch.randn(4, 5, 8), torch.randn(4, 3, 8)
    plain(src, tgt).square().mean().backward()
    want = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad(set_to_none=True)
    model = nn.parallel.DistributedDataParallel(seqkern.accelerate(plain))
    mine = slice(2 * rank, 2 * rank + 2)
    model(src[mine], tgt[mine]).square().mean().backward()
    for p, grad in zip(plain.parameters(), want):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)
    dist.destroy_process_group()
"""


def test_two_ranks_average_their_gradients(tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(rank), str(tmp_path / "store")],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for each in ranks:
        _, errors = each.communicate(timeout=120)
        assert each.returncode == 0, errors
