"""The compiled attention kernels against the float64 oracle, on every instruction set that this machine runs."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import seqkern
from seqkern.functional import attention, scaled_dot_product_attention
from seqkern.ops import _library
from seqkern.ops.attention import NEEDS
from seqkern.spec import attention as spec
from seqkern.spec.attention import Tensors
from seqkern.testing import assert_close, on_threads, relative_rms
from seqkern.testing_attention import (
    BANDS,
    LAYOUTS,
    OPTIONS,
    SHAPES,
    Case,
    check,
    draw_options,
    laid_out,
    make_case,
    run,
)

NATIVE = _library.native()
pytestmark = [pytest.mark.native, pytest.mark.built]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
PACKED = ((3, 5), (0, 2), (40, 70), (2, 0))
# few queries of several heads side by side; several blocks of keys; keys split in parts, and those of a single panel;
# chunks of the backward
SIZES = {
    "side by side": {"Hq": 4, "Hkv": 2, "L": 5, "S": 7, "D": 8},
    "blocks": {"Hq": 3, "Hkv": 3, "L": 70, "S": 300, "D": 40, "Dv": 17},
    "split": {"B": 1, "Hq": 8, "Hkv": 1, "L": 3, "S": 2100, "D": 20},
    "one panel": {"B": 1, "Hq": 1, "Hkv": 1, "L": 20, "S": 300, "D": 40, "Dv": 17},
    "chunks": {"B": 1, "Hq": 2, "Hkv": 1, "L": 130, "S": 530, "D": 64},
}


def named(dtype):
    return str(dtype)[6:]


ISAS = NATIVE.isas() if NATIVE else ["none"]


def several(*args, **options) -> list[Case]:
    """One case, or, where few numbers that cancel have a gradient, four that count as one sample."""
    few = options.get("sinks") or options.get("alibi") or options.get("bias") == "queries"
    return [make_case(*args, **options, seed=seed) for seed in range(4 if few else 1)]


# every dtype on one instruction set, every instruction set with one dtype; the rest is in the full product
@pytest.mark.parametrize(
    ("isa", "dtype"),
    [*((ISAS[-1], dtype) for dtype in DTYPES), *((isa, torch.float32) for isa in ISAS[:-1])],
    indirect=["isa"],
    ids=lambda x: x if isinstance(x, str) else named(x),
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(isa, options, dtype, packed):
    lengths = PACKED if packed else ()
    check(several(dtype, lengths=lengths, Hq=4, Hkv=2, L=37, S=70, D=20, Dv=17, **OPTIONS[options]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
def test_full_product(isa, options, sizes, dtype):
    check(several(dtype, **SIZES[sizes], **OPTIONS[options]))


@pytest.mark.parametrize("L", [1, 2, 3, 5, 16, 17])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "options", ["plain", "everything", "sinks", "bias, keys", "bias, queries", "dropout"]
)
def test_few_queries(isa, options, packed, L):
    lengths = ((L, 151), (1, 3), (0, 4), (L, 0)) if packed else ()
    check(several(Hq=2, Hkv=1, L=L, S=151, D=20, Dv=17, lengths=lengths, **OPTIONS[options]))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", ["plain", "everything", "sinks", "bias, full", "mask and bias"])
def test_sizes(options, sizes):
    check(several(**SIZES[sizes], **OPTIONS[options]))


@pytest.mark.parametrize("size", [(130, 130), (70, 340), (340, 70)], ids=str)
@pytest.mark.parametrize("band", BANDS)
def test_bands(band, size):
    L, S = size
    check(make_case(B=1, Hq=2, Hkv=1, L=L, S=S, D=16, **BANDS[band]))


@pytest.mark.parametrize(
    ("D", "Dv"), [(1, 1), (3, 16), (16, 100), (80, 64), (160, 256), (33, 7), (512, 512), (1, 300)]
)
def test_head_sizes(isa, D, Dv):
    check(make_case(B=1, Hq=2, Hkv=1, L=9, S=35, D=D, Dv=Dv))


@pytest.mark.parametrize(
    "shape",
    [{"B": 0}, {"L": 0}, {"S": 0}, {"L": 1, "S": 1}, {"Hq": 6, "Hkv": 3, "L": 1}, {"L": 33, "S": 129}],
)
@pytest.mark.parametrize("options", ["plain", "causal", "sinks", "bias, keys", "mask and bias"])
def test_small_and_empty(options, shape):
    check(several(**{"D": 16, **shape}, **OPTIONS[options]))


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    B=st.integers(1, 3),
    groups=st.integers(1, 5),
    Hkv=st.integers(1, 2),
    L=st.integers(1, 80),
    S=st.integers(1, 300),
    D=st.integers(1, 70),
    Dv=st.integers(1, 70),
)
def test_any_shape_and_options(data, dtype, B, groups, Hkv, L, S, D, Dv):
    drawn = draw_options(data.draw, st, 90)
    sizes = {"B": B, "Hq": groups * Hkv, "Hkv": Hkv, "L": L, "S": S, "D": D, "Dv": Dv}
    check([make_case(dtype, **sizes, **drawn, seed=seed) for seed in range(4)], slack=4)


# strides and memory


@pytest.mark.parametrize("L", [3, 37])
@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_strides(dtype, how, L):
    case = make_case(dtype, Hq=2, Hkv=2, L=L, S=37, D=16, mask="full", bias="full", sinks=True)
    t = Tensors(*(x if x is None or x.dim() < 4 else laid_out(x, how) for x in case.tensors))
    check(Case(t, case.options, (laid_out(case.grads[0], how), case.grads[1])))


@pytest.mark.parametrize(
    "options", ["plain", "everything", "bias, heads shared", "bias, queries", "alibi", "sinks"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_bits_do_not_depend_on_threads(dtype, options):
    case = make_case(dtype, B=2, Hq=4, Hkv=2, L=151, S=701, D=32, **OPTIONS[options])
    found = on_threads(lambda: run(case))
    for other in found[1:]:
        for name, x in found[0].items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize(("heads", "L"), [(6, 150), (12, 150), (20, 10), (40, 7)])
def test_heads_that_share_a_bias_add_to_its_gradient_in_order(isa, heads, L):
    """The heads of a query straddle the blocks in which units follow one another."""
    case = make_case(B=2, Hq=heads, Hkv=2, L=L, S=300, D=2, **OPTIONS["bias, heads shared"])
    first, *others = on_threads(lambda: [run(case)["d_bias"] for _ in range(5)])
    assert all(torch.equal(x, first[0]) for found in (first, *others) for x in found)


@pytest.mark.parametrize("L", [2, 40])
@pytest.mark.parametrize("lowest", ["min", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_a_finite_bias_hides_no_key(isa, dtype, lowest, L):
    """Weights of a row whose keys all have the lowest number are uniform, not none; a loss that leaves the row out
    gets gradients of the others."""
    q, k, v, g = (torch.randn(1, 2, n, 8, dtype=dtype) for n in (L, 50, 50, L))
    bias = torch.zeros(1, 1, L, 50, dtype=dtype)
    if lowest == "max":
        bias[..., 1:, 3] = torch.finfo(dtype).max
    else:
        bias[..., 1:, :] = torch.finfo(dtype).min
    g[:, :, 1:] = 0
    found = {}
    for backend in ("cpu", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        out = attention(*inputs[:3], bias=inputs[3], backend=backend)
        found[backend] = [out, *torch.autograd.grad(out, inputs, g)]
    for got, want in zip(found["cpu"], found["reference"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_scores_beyond_the_exponents_are_finite(isa):
    """Where a rounded log-sum-exp is off by more than the largest exponent, a weight is still at most 1."""
    q, k, v = (torch.randn(1, 2, 300, 8) * size for size in (2e4, 2e4, 1))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    grads = torch.autograd.grad(attention(q, k, v, backend="cpu").sum(), (q, k, v))
    assert all(x.isfinite().all() for x in grads)
    assert grads[2].max() <= 300


@pytest.mark.parametrize("options", ["plain", "causal", "bias, full"])
def test_a_part_of_the_batch_has_the_bits_of_the_whole(options):
    case = make_case(B=3, Hq=2, Hkv=2, L=64, S=64, D=32, **OPTIONS[options])
    whole = torch.ops.seqkern.attention(*case.tensors, *case.options)[0]
    part = Tensors(*(x if x is None else x[1:2] for x in case.tensors))
    assert torch.equal(torch.ops.seqkern.attention(*part, *case.options)[0], whole[1:2])


# what is asked for beside the output


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_weights(dtype, options, weights):
    case = make_case(dtype, B=2, Hq=4, Hkv=2, L=40, S=151, D=16, weights=weights, **OPTIONS[options])
    got = torch.ops.seqkern.attention(*case.tensors, *case.options)[2]
    want = spec.attention(*case.to(torch.float64).tensors, *case.options)[2]
    rounded = spec.attention(*case.tensors, *case.options)[2]
    assert_close({"weights": got}, {"weights": want}, {"weights": relative_rms(rounded, want)})


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("options", ["plain", "everything", "window", "sinks"])
@pytest.mark.parametrize("sizes", [(90, 300), (300, 1), (17, 129), (3, 150), (7, 151), (16, 2100)], ids=str)
def test_weights_beside_an_output_that_does_not_change(isa, sizes, options, weights):
    case = make_case(B=1, Hq=4, Hkv=2, L=sizes[0], S=sizes[1], D=8, weights=weights, **OPTIONS[options])
    plain = case.options._replace(weights="")
    want = torch.ops.seqkern.attention(*case.tensors, *plain)[:2]
    found = on_threads(lambda: torch.ops.seqkern.attention(*case.tensors, *case.options))
    for got in found:
        assert (
            torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[2], found[0][2])
        )
    exact = spec.attention(*case.to(torch.float64).tensors, *case.options)[2]
    assert relative_rms(got[2], exact) < 5e-6


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("options", ["plain", "everything", "dropout", "sinks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=named)
def test_gradient_of_the_weights(isa, dtype, options, weights):
    case = make_case(dtype, B=2, Hq=4, Hkv=2, L=9, S=151, D=16, weights=weights, **OPTIONS[options])
    arguments = (*case.tensors, *case.options)
    output, lse, shares = torch.ops.seqkern.attention(*arguments)
    grads = (*case.grads, torch.randn(shares.shape, dtype=torch.float64).to(dtype))
    got = torch.ops.seqkern.attention_backward(*grads, output, lse, *arguments, *((True,) * len(NEEDS)))
    wide = case.to(torch.float64)
    want = spec.attention_backward((*wide.grads, grads[2].double()), *wide.tensors, *case.options)
    for name, d, reference in zip(spec.Gradients._fields, got, want):
        if reference is not None:
            allowed = {torch.float64: 1e-11, torch.float32: 5e-6, torch.bfloat16: 0.015}[dtype]
            assert relative_rms(d, reference) < allowed, name


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("extra", [torch.float64, torch.float16, torch.float32], ids=named)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_bias_slopes_and_sinks_of_a_dtype_of_their_own(dtype, extra, shape):
    case = make_case(dtype, L=9, S=40, D=16, bias=shape, alibi=1, sinks=True)
    t = case.tensors
    own = {name: getattr(t, name).to(extra) for name in ("bias", "alibi_slopes", "sinks")}
    found = run(Case(t._replace(**own), case.options, case.grads))
    assert all(found[f"d_{name}"].dtype == extra for name in own)
    same = {name: x.to(torch.float32) for name, x in own.items()}
    want = run(Case(t._replace(**same), case.options, case.grads))
    for name, x in want.items():
        torch.testing.assert_close(found[name].to(x.dtype), x, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("along", [2, 3], ids=["queries", "keys"])
def test_gradient_of_an_expanded_bias_has_its_shape(along):
    case = make_case(L=9, S=40, D=16, bias="full")
    bias = case.tensors.bias
    assert bias is not None
    bias = bias.narrow(along, 0, 1).expand(bias.shape)
    check(Case(case.tensors._replace(bias=bias), case.options, case.grads))


@pytest.mark.parametrize(("G", "L"), [(3, 3), (3, 6), (7, 2), (31, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=named)
def test_gradient_of_a_bias_of_all_queries_where_heads_stand_side_by_side(isa, dtype, G, L):
    """A panel of 4, 8, 16 or 32 queries that begins and ends with one head of three or more."""
    case = make_case(dtype, B=2, Hq=2 * G, Hkv=2, L=L, S=9, bias="full")
    assert case.tensors.bias is not None
    check(Case(case.tensors._replace(bias=case.tensors.bias[:, :, :1]), case.options, case.grads))


def test_fully_hidden_rows_are_zero_and_take_no_gradient():
    q, k, v = (torch.randn(1, 2, 40, 16, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 7, :] = False
    output, lse = attention(q, k, v, mask=mask, return_lse=True, backend="cpu")
    assert (output[:, :, 7] == 0).all() and (lse[:, :, 7] == -torch.inf).all()
    output.square().sum().backward()
    assert q.grad is not None and (q.grad[:, :, 7] == 0).all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("hidden", [torch.nan, torch.inf])
@pytest.mark.parametrize("L", [3, 40])
@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"mask": "heads shared"}, lambda L: slice(150, 151)),
        ({"mask": "heads shared", "softcap": 5.0}, lambda L: slice(150, 151)),
        ({"window": (5, -1), "causal": "bottom-right"}, lambda L: slice(0, 151 - L - 5)),
        ({"causal": "top-left", "softcap": 5.0, "dropout_p": 0.2}, lambda L: slice(L, 151)),
    ],
    ids=["mask", "mask and cap", "window", "causal"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_what_no_query_sees_does_not_leak(isa, dtype, hidden, options, keys, L):
    case = make_case(dtype, B=2, Hq=4, Hkv=2, L=L, S=151, D=16, **options)
    arguments = (*case.tensors, *case.options)

    def both():
        output, lse, _ = torch.ops.seqkern.attention(*arguments)
        return output, *torch.ops.seqkern.attention_backward(
            *case.grads, None, output, lse, *arguments, *((True,) * len(NEEDS))
        )[:3]

    want = both()
    for x in case.tensors[1:3]:
        x[:, :, keys(L)] = hidden
    assert all(torch.equal(a, b) for a, b in zip(both(), want))


@pytest.mark.parametrize("options", ["mask", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_where_a_value_leaks_does_not_depend_on_threads(isa, dtype, options):
    """A value that is not finite reaches the queries beside those that see it, whichever panels share a block."""
    q, k, v = (torch.randn(1, 8, n, 16, dtype=dtype) for n in (128, 128, 128))
    more = {"window": (20, 0)}
    v[:, :, 5] = torch.nan
    if options == "mask":
        more = {"mask": torch.ones(128, 128, dtype=torch.bool)}
        more["mask"][:, 5] = torch.arange(128) == 100
    first, *others = on_threads(lambda: attention(q, k, v, backend="cpu", **more).isnan())
    assert first.any() and not first[:, :, :64].all() and all(torch.equal(first, each) for each in others)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
@pytest.mark.parametrize("D", [16, 21])  # of 21 a vector, or a pair, would read into the next row
@pytest.mark.parametrize("L", [7, 40])
@pytest.mark.parametrize("added", [None, 0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
def test_what_is_not_finite_travels_as_in_torch(isa, dtype, added, L, D, which, value):
    tensors = [torch.randn(1, 2, n, D, dtype=dtype) for n in (L, 41, 41)]
    tensors[which][0, 1, 5, 3] = value
    if added is not None:
        tensors.append(added * torch.randn(L, 41, dtype=dtype))
    want = F.scaled_dot_product_attention(*(x.double() for x in tensors))
    got = scaled_dot_product_attention(*tensors)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


def test_scores_that_are_all_minus_infinity_hide_all_keys_beside_a_bias(isa):
    q, k, v = torch.ones(1, 1, 9, 4), torch.ones(1, 1, 30, 4), torch.randn(1, 1, 30, 4)
    k[..., 0] = -torch.inf
    output, lse = attention(q, k, v, bias=torch.zeros(9, 30), return_lse=True, backend="cpu")
    assert (output == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("L", [3, 40])
@pytest.mark.parametrize("option", ["tiny cap", "high cap", "alibi", "sinks"])
def test_options_at_the_end_of_the_range(isa, option, L):
    """Finite numbers stay so in units of log 2."""
    options = {
        "tiny cap": {"softcap": 1e-39},
        "high cap": {"softcap": 2.5e38},
        "alibi": {"alibi_slopes": torch.full((2,), 3e38)},
        "sinks": {"sinks": torch.full((2,), 3e38)},
    }[option]
    q, k, v = (torch.randn(1, 2, n, 16) for n in (L, 150, 150))
    got, want = (attention(q, k, v, **options, backend=backend) for backend in ("cpu", "reference"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_the_op_checks_what_it_reads():
    q, k, v = make_case().tensors[:3]
    seed = torch.tensor([1])
    for wrong, says in (
        ((q, k[:, :, :3], v), "agree"),
        ((q, k[..., :4], v), "head size"),
        ((q.int(), k, v), "float32"),
        ((q, k.double(), v), "dtype"),
    ):
        with pytest.raises(RuntimeError, match=f"seqkern: .*{says}"):
            torch.ops.seqkern.attention(*wrong, *((None,) * 7), 1.0, 0.0, 0.0, -1, -1, False, 0, 0, "")
    rows, cu = torch.zeros(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_seqlen"):
        torch.ops.seqkern.attention(
            rows, rows, rows, None, None, None, None, seed, cu, cu, 1.0, 0.0, 0.0, -1, -1, False, 5, 6, ""
        )


def test_it_is_the_default_on_a_cpu():
    q, k, v = (torch.randn(1, 2, 500, 64) for _ in range(3))
    assert str(seqkern.explain(scaled_dot_product_attention, q, k, v)) == "(itself) (attention): cpu"


@pytest.mark.parametrize("L", [1, 7, 64])
def test_small_calls_are_ours(L):
    q, k, v = (torch.randn(1, 2, L, 16) for _ in range(3))
    for query in (q, q.clone().requires_grad_()):
        told = str(seqkern.explain(scaled_dot_product_attention, query, k, v)).splitlines()[0]
        assert told == "(itself) (attention): cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_calls_give_torch_what_is_added_to_the_scores_unrounded(dtype):
    q, k, v = (torch.randn(2, 4, n, 16, dtype=dtype) for n in (33, 2, 2))
    distant = {"alibi_slopes": torch.rand(4).to(dtype), "causal": True}
    for more in ({"bias": 30 + torch.randn(33, 2)}, distant):
        with seqkern.backend("torch"):
            got = attention(q, k, v, **more)
        wide = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in more.items()}
        exact = attention(q.double(), k.double(), v.double(), backend="reference", **wide)
        assert relative_rms(got, exact) < torch.finfo(dtype).eps / 2


LONG = """
import resource, torch
from seqkern.functional import attention
L, D = 16384, 64
q, k, v = (torch.randn(1, 1, L, D, requires_grad=True) for _ in range(3))
attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], window=8).sum().backward()
for x in (q, k, v):
    x.grad = None
output, grads = torch.ones(1, 1, L, D), [torch.ones(1, 1, L, D) for _ in range(3)]
del output, grads  # their pages stay with the process for the results
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v, causal=True, backend="cpu").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_grows_with_the_length_alone():
    """Forward and backward at L = 16384: the weights of one head would take 1024 MB."""
    done = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, check=True, timeout=300
    )
    assert float(done.stdout) < 64
