"""The attention kernels against a float64 oracle: in Triton's interpreter on a CPU, or on the GPU that is here.

TRITON_INTERPRET=1 python -m pytest -m interpreter tests      python -m pytest -m gpu tests

bfloat16 is left to the GPU: the interpreter's tl.dot is wrong on it.
"""

from functools import cache, partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seqkern import tune
from seqkern.kernels import attention, attention_backward, decode, launch, serve, tuning_cache
from seqkern.kernels.tuning_attention import is_decode, key
from seqkern.ops import _hardware
from seqkern.ops.attention import NEEDS, empty_gradients, empty_outputs, run_triton, run_triton_backward
from seqkern.spec import attention as spec
from seqkern.spec.attention import Tensors
from seqkern.testing import assert_close, relative_rms
from seqkern.testing_attention import BANDS, LAYOUTS, OPTIONS, Case, check, draw_options, laid_out, run
from seqkern.testing_attention import make_case as make_case_on_cpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
    ),  # Triton's
]

DEVICE = "cpu" if _hardware.INTERPRETED else "cuda"
HALVES = (torch.float16,) if DEVICE == "cpu" else (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES)
PACKED = ((2, 3), (0, 2), (3, 0), (36, 33))
SMALL = {"Hq": 2, "Hkv": 1, "L": 36, "S": 33, "D": 20, "Dv": 17}
kernels = (run_triton, run_triton_backward)


@pytest.fixture(autouse=True, scope="module")
def by_the_rules():
    """Whatever was measured on this machine."""
    with mock.patch.object(tuning_cache, "measured", cache(dict)):
        yield


def named(dtype):
    return str(dtype)[6:]


def make_case(*args, **options):
    return make_case_on_cpu(*args, **options).on(DEVICE)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, packed):
    lengths = PACKED if packed else ()
    check(make_case(lengths=lengths, **SMALL, **OPTIONS[options]), *kernels)


@pytest.mark.parametrize(
    "options", ["plain", "everything", "bias, keys", "mask and bias", "sinks in a window"]
)
@pytest.mark.parametrize("dtype", HALVES, ids=named)
def test_half(options, dtype):
    check(make_case(dtype, **SMALL, **OPTIONS[options]), *kernels)


@pytest.mark.slow
@pytest.mark.parametrize("D", [16, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=named)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_full_product(options, packed, dtype, D):
    lengths = ((70, 90), (1, 40), (33, 1)) if packed else ()
    sizes = {"Hq": 4, "Hkv": 2, "L": 70, "S": 90, "D": D, "Dv": D - 8}
    seeds = range(4) if OPTIONS[options].get("sinks") else (0,)
    check(
        [make_case(dtype, lengths=lengths, **sizes, **OPTIONS[options], seed=seed) for seed in seeds],
        *kernels,
    )


@pytest.mark.parametrize("size", [(130, 130), (70, 140), (140, 70)], ids=str)
@pytest.mark.parametrize("band", BANDS)
def test_bands(band, size):
    L, S = size
    check(make_case(B=1, Hq=1, Hkv=1, L=L, S=S, D=16, **BANDS[band]), *kernels)


@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (3, 16), (16, 100), (80, 64), (160, 256)])
def test_head_sizes(D, Dv):
    check(make_case(B=1, Hq=2, Hkv=1, L=9, S=35, D=D, Dv=Dv), *kernels)


@pytest.mark.parametrize(
    "shape", [{"B": 0}, {"L": 0}, {"S": 0}, {"Hq": 0}, {"L": 1, "S": 1}, {"Hq": 6, "Hkv": 3, "L": 1}]
)
@pytest.mark.parametrize("options", ["plain", "causal", "sinks", "bias, keys", "mask and bias"])
def test_small_and_empty(options, shape):
    check(make_case(**{"D": 16, **shape}, **OPTIONS[options]), *kernels)


@settings(max_examples=10, deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from(DTYPES),
    groups=st.integers(1, 3),
    L=st.integers(1, 40),
    S=st.integers(1, 70),
    D=st.integers(1, 40),
    Dv=st.integers(1, 40),
)
def test_any_shape_and_options(data, dtype, groups, L, S, D, Dv):
    sizes = {"B": 2, "Hq": groups, "Hkv": 1, "L": L, "S": S, "D": D, "Dv": Dv}
    draw = partial(make_case, dtype, **sizes, **draw_options(data.draw, st, 40))
    check([draw(seed=seed) for seed in range(4)], *kernels)


def forced(case, config, *names):
    shape = launch.prepare(case.tensors, case.options).shape
    return tuning_cache.forced({key(name, shape): config for name in names})


def blocks(each):
    return each.arguments["BLOCK_M"], each.arguments["BLOCK_N"], each.num_warps, each.num_stages


@pytest.mark.parametrize("config", [(32, 64, 4, 1), (64, 32, 4, 2), (128, 32, 8, 2)], ids=str)
@pytest.mark.parametrize("options", ["causal", "everything"])
def test_any_blocks(options, config):
    """What a measurement may choose: no result hangs on the blocks, nor does the mask of dropout."""
    case = make_case(torch.float16, B=1, Hq=2, Hkv=1, L=70, S=75, D=16, **OPTIONS[options])
    t, o, needs = case.tensors, case.options, (True, True, False, False, False)
    output, lse, _ = empty_outputs(t, o)
    with forced(case, config, "forward", "keys", "queries"):
        made = [attention.forward_launch(t, o, output, lse)]
        arguments = (t, o, case.grads[0], None, output, lse, empty_gradients(t, needs), needs)
        made += attention_backward.backward_launches(*arguments)[0][1:]
        assert [blocks(each) for each in made] == [config] * 3
        check(case, *kernels)


@pytest.mark.parametrize("config", [(16, 32, 8, 1), (64, 128, 4, 2)], ids=str)
def test_any_blocks_of_decode(config):
    case = make_case(torch.float16, B=2, Hq=4, Hkv=2, L=3, S=700, D=20, Dv=17, **OPTIONS["everything"])
    with forced(case, config, "decode"):
        made = decode.decode_launches(
            case.tensors, case.options, *empty_outputs(case.tensors, case.options)[:2]
        )
        assert blocks(made[0]) == config
        check_decode(case)


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
def test_what_is_tuned_runs(extras, tmp_path):
    ran = set()

    def timer(call):
        keys = tuning_cache.force.get().configs.keys()
        if not keys <= ran:  # the rule's own: others may not fit, and take a while to compile
            call()
            ran.update(keys)
        return 1.0

    works = [
        tune.Attention("float16", 16, extras, L=20, B=1, H=2),
        tune.Decode("float16", 16, extras, S=600, B=1),
    ]
    rows = tune.tune(works, DEVICE, timer, tmp_path / "tuning.json")
    assert {row.key for row in rows} == ran and len(rows) == 4


def outputs_of(case, function):
    t, o = case.tensors, case.options
    output, lse, _ = empty_outputs(t, o)
    for x in (output, lse):
        x.fill_(torch.nan)
    function(t, o, output, lse)
    return output, lse


@pytest.mark.parametrize("lengths", [(), ((2, 300), (0, 2), (3, 0), (1, 700))], ids=["dense", "packed"])
@pytest.mark.parametrize("options", OPTIONS)
def test_decode(options, lengths):
    check_decode(make_case(B=2, Hq=4, Hkv=2, L=3, S=700, D=20, Dv=17, lengths=lengths, **OPTIONS[options]))


def check_decode(case):
    arguments = (*case.tensors, *case.options)
    want = spec.attention(*case.to(torch.float64).tensors, *case.options)
    rounded = spec.attention(*arguments)
    names = ("output", "lse")

    def finite(found):
        return {name: torch.where(x == -torch.inf, 0.0, x) for name, x in zip(names, found)}

    got, want, rounded = map(finite, (outputs_of(case, decode.decode), want, rounded))
    errors = {name: relative_rms(rounded[name], want[name]) for name in names}
    assert_close(got, want, errors)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("L", [1, 20], ids=["decode", "forward"])
@pytest.mark.parametrize("lowest", ["min", "max", "one"])
def test_a_finite_bias_hides_no_key(lowest, L):
    """Weights of a row whose keys all have the lowest number are uniform, not none; gradients of the other rows."""
    q, k, v, g = (torch.randn(1, 2, n, 16) for n in (L, 512, 512, L))
    bias = torch.zeros(1, 1, L, 512)
    row = slice(1, None) if L > 1 else slice(None)
    if lowest == "max":
        bias[..., row, 3] = torch.finfo(torch.float32).max
    else:
        bias[..., row, slice(None) if lowest == "min" else 5] = torch.finfo(torch.float32).min
    if L > 1:
        g[:, :, 1:] = 0
    t, o = Tensors(q, k, v, bias=bias), spec.Options(0.25)
    want = spec.attention(*t, *o)[0]
    on_device = Tensors(*(x if x is None else x.to(DEVICE) for x in t))
    output, lse, _ = run_triton(*on_device, *o)
    torch.testing.assert_close(output.cpu(), want, rtol=1e-5, atol=1e-5)
    if L == 1:
        return
    leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
    spec.attention(*leaves[:3], None, leaves[3], *t[5:], *o)[0].backward(g)
    grads = run_triton_backward(
        g.to(DEVICE), torch.zeros_like(lse), None, output, lse, *on_device, *o, *((True,) * len(NEEDS))
    )
    for got, leaf in zip(grads[:4], leaves, strict=True):
        torch.testing.assert_close(got.cpu(), leaf.grad, rtol=1e-5, atol=1e-5)


def test_decode_is_chosen_for_few_queries():
    assert is_decode(1, 4096, 8) and is_decode(4, 1024, 4)
    assert not is_decode(1, 512, 1) and not is_decode(17, 4096, 1) and not is_decode(8, 4096, 16)
    case = make_case(B=1, Hq=8, Hkv=1, L=1, S=600, D=16, sinks=True)
    check(case, *kernels)


@pytest.mark.parametrize("weights", ["heads", "mean"])
@pytest.mark.parametrize("options", ["plain", "everything", "sinks"])
def test_weights(options, weights):
    case = make_case(B=2, Hq=2, Hkv=1, L=70, S=66, weights=weights, **OPTIONS[options])
    arguments = (*case.tensors, *case.options)
    got = run_triton(*arguments)[2]
    want = spec.attention(*case.to(torch.float64).tensors, *case.options)[2]
    assert relative_rms(got, want) < 1e-6


@pytest.mark.parametrize("how", [how for how in LAYOUTS if how != "rows last"])
def test_strides(how):
    case = make_case(Hq=2, Hkv=2, L=9, S=9, D=16, mask="full", bias="full", sinks=True)
    t = Tensors(*(x if x is None or x.dim() < 4 else laid_out(x, how) for x in case.tensors))
    laid = Case(t, case.options, tuple(laid_out(g, how) if g.dim() == 4 else g for g in case.grads))
    dense = Case(
        Tensors(*(x if x is None else x.contiguous() for x in t)),
        case.options,
        tuple(g.contiguous() for g in laid.grads),
    )
    got, want = run(laid, *kernels), run(dense, *kernels)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("which", ["query", "key", "value", "grad_output"])
def test_offsets_beyond_32_bits(which):
    case = make_case(torch.float16, B=1, Hq=1, Hkv=1, L=18, S=18, D=16)
    want = run(case, *kernels)
    far = 2**27 + 8  # 17 rows apart lie past 2^31 elements; only the rows themselves are ever touched

    def spread(x):
        wide = torch.empty(far * 17 + 16, dtype=x.dtype, device=DEVICE).as_strided(x.shape, (0, 0, far, 1))
        return wide.copy_(x)

    if which == "grad_output":
        case = Case(case.tensors, case.options, (spread(case.grads[0]), case.grads[1]))
    else:
        t = case.tensors
        case = Case(t._replace(**{which: spread(getattr(t, which))}), case.options, case.grads)
    got = run(case, *kernels)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("how", ["mask", "window", "causal", "packed"])
def test_what_nobody_sees_may_be_nan(how):
    more = {
        "mask": {"mask": "keys"},
        "window": {"window": (1, 0), "L": 3},
        "causal": {"causal": "top-left", "L": 3},
        "packed": {"lengths": ((3, 4), (0, 3), (2, 5))},
    }
    case = make_case(D=16, **more[how])
    want = run(case, *kernels)
    keys = slice(4, 7) if how == "packed" else 0 if how == "window" else -1
    for x in (case.tensors.key, case.tensors.value):
        (x if how == "packed" else x.transpose(0, 2))[keys] = torch.nan
    got = run(case, *kernels)
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("needed", NEEDS)
@pytest.mark.parametrize("bias", ["full", "keys"])
def test_only_what_is_needed(bias, needed):
    case = make_case(B=1, Hq=2, Hkv=1, L=5, S=6, D=16, bias=bias, alibi=1, sinks=True)
    arguments = (*case.tensors, *case.options)
    output, lse, _ = run_triton(*arguments)

    def gradients(needs):
        return run_triton_backward(*case.grads, None, output, lse, *arguments, *needs)

    every = gradients([True] * len(NEEDS))
    owner = ["need_query", "need_key_value", "need_key_value", *NEEDS[2:]]
    for name, got, want in zip(owner, gradients([n == needed for n in NEEDS]), every):
        assert torch.equal(got, want) if name == needed else got.shape == (0,)


def test_a_gradient_of_lse_alone():
    case = make_case(torch.float32, L=5, S=6, D=16, sinks=True)
    arguments = (*case.tensors, *case.options)
    output, lse, _ = run_triton(*arguments)
    got = run_triton_backward(None, case.grads[1], None, output, lse, *arguments, *([True] * len(NEEDS)))
    want = spec.attention_backward((None, case.grads[1], None), *arguments)
    for a, b in zip(got, want):
        if b is not None:
            torch.testing.assert_close(a, b)


def test_packed_lengths_beyond_the_memory_are_cut():
    """Where a GPU is not waited for, cu_seqlens are not checked: the kernels must not read past the tensors."""
    case = make_case(D=16, lengths=((2, 3), (3, 4)))
    wrong = case.tensors._replace(
        cu_seqlens_q=torch.tensor([0, 2, 50], device=DEVICE),
        cu_seqlens_k=torch.tensor([0, 3, 70], device=DEVICE),
    )
    wide = case.options._replace(max_seqlen_q=48, max_seqlen_k=67)
    got, want = run_triton(*wrong, *wide), run_triton(*case.tensors, *case.options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def test_packed_lengths_that_were_told_too_small_are_cut():
    """By them the memory is sized that parts of keys and the gradient of slopes are written to."""
    case = make_case(D=16, lengths=((3, 2), (300, 4)), alibi=True)
    told = case.options._replace(max_seqlen_q=1, max_seqlen_k=300)
    cut = case.tensors._replace(cu_seqlens_q=torch.tensor([0, 1, 5], device=DEVICE))
    output, lse, shares = (x.fill_(torch.nan) for x in empty_outputs(case.tensors, told))
    serve.forward(case.tensors, told, output, lse, shares)
    want, want_lse, _ = run_triton(*cut, *told)
    assert torch.equal(output[0], want[0]) and torch.equal(lse[:, 0], want_lse[:, 0])
    assert output[1:3].isnan().all() and lse[:, 1:3].isnan().all()  # which were told not to be there


def gradients(t, o, grad_output, grad_lse):
    output, lse, _ = run_triton(*t, *o)
    needs = True, True, *(x is not None for x in (t.bias, t.alibi_slopes, t.sinks))
    return output, lse, run_triton_backward(grad_output, grad_lse, None, output, lse, *t, *o, *needs)


@pytest.mark.parametrize("hidden_by", ["bias", "mask"])
def test_a_gradient_that_is_not_finite_stops_at_a_row_that_sees_nothing(hidden_by):
    """As of the square of lse, which is -inf there: 2 lse 0."""
    case = make_case(**SMALL, bias="full", mask="full" if hidden_by == "mask" else "")
    t = case.tensors
    if hidden_by == "mask":
        t.mask[:, :, 3] = False
    else:
        t.bias[:, :, 3] = -torch.inf
    grad_output, grad_lse = (g.clone() for g in case.grads)
    grad_lse[:, :, 3] = torch.nan
    output, lse, got = gradients(t, case.options, grad_output, grad_lse)
    assert (output[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    grad_lse[:, :, 3] = 0
    for one, other in zip(got, gradients(t, case.options, grad_output, grad_lse)[2], strict=True):
        assert torch.equal(one, other)
        assert not one.isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    "options", [{"mask": "keys"}, {"causal": "top-left"}, {"mask": "full", "window": (4, 4)}], ids=str
)
def test_a_hidden_key_has_no_gradient_behind_a_cap(options, value):
    case = make_case(**SMALL | {"L": 20}, softcap=2.0, **options)
    t = case.tensors
    if t.mask is not None:
        t.mask[..., 28:] = False
    t.key[:, :, 28:] = t.value[:, :, 28:] = value
    output, _, got = gradients(t, case.options, *case.grads)
    for each in (output, *(g for g in got if g is not None)):
        assert not each.isnan().any()
    assert (got[1][:, :, 28:] == 0).all() and (got[2][:, :, 28:] == 0).all()


@pytest.mark.parametrize("L", [20, 1])
def test_no_sink_for_a_head(L):
    case = make_case(**SMALL | {"L": L, "S": 600 if L == 1 else 33}, sinks=True, mask="full")
    t = case.tensors
    t.mask[:, :, 0] = False
    t.sinks[0] = -torch.inf
    output, lse, got = gradients(t, case.options, *case.grads)
    assert (output[:, 0, 0] == 0).all() and (lse[:, 0, 0] == -torch.inf).all()
    assert torch.allclose(lse[:, 1, 0], t.sinks[1])
    for each in (output, *(g for g in got if g is not None)):
        assert not each.isnan().any()
    assert got[-1][0] == 0
