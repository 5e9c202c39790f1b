"""The attention kernels for Hopper: which calls they take, what the compiler makes of them, what they compute.

The backward kernels run in Triton's interpreter too; the forward, in Gluon, runs on such a GPU alone.
"""

import warnings
from unittest import mock

import pytest
import torch
import triton

from seqkern.kernels import (
    attention,
    attention_backward,
    hopper,
    hopper_backward,
    serve,
    tuning_cache,
)
from seqkern.kernels.compilation import SHARED_LIMIT, compiled, complaints, listing, resources
from seqkern.kernels.tuning_hopper import SHORTEST, readable, takes
from seqkern.ops.attention import NEEDS, empty_gradients, empty_outputs, run_triton, split
from seqkern.spec.attention import Tensors
from seqkern.testing import relative_rms
from seqkern.testing_attention import LAYOUTS, OPTIONS, Case, check, laid_out, make_case, run

CAUSAL = ("top-left", "bottom-right", "")
BOTH = (True, True, False, False, False)  # gradients of query, key and value are needed
interpreter = pytest.mark.interpreter
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="the GPU is no Hopper")(test))


def call(dtype=torch.bfloat16, L=512, S=512, D=64, **options) -> Case:
    return make_case(dtype, B=1, Hq=2, Hkv=1, L=L, S=S, D=D, **options)


# Which calls


def taken(case: Case, arch: int = 90) -> bool:
    return takes(arch, case.tensors, case.options)


@pytest.mark.parametrize("arch", [90, 99])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("causal", CAUSAL)
def test_takes_plain_calls(causal, D, dtype, arch):
    assert taken(call(dtype, D=D, causal=causal), arch)
    assert taken(call(dtype, D=D, L=517, S=2049, causal=causal), arch)


@pytest.mark.parametrize("arch", [80, 86, 89, 100, 103, 120])
def test_leaves_other_architectures(arch):
    assert not taken(call(), arch)


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        {"dtype": torch.float64},
        {"D": 32},
        {"D": 96},
        {"D": 256},
        {"Dv": 128},
        {"D": 128, "Dv": 64},
        {"L": SHORTEST - 1},
        {"S": SHORTEST - 1},
        {"L": 0},
        {"S": 0},
        {"weights": "mean"},
        {"window": (-1, 3)},
        {"window": (600, -1)},
        {"lengths": ((512, 512), (600, 600))},
    ],
    ids=str,
)
def test_leaves_other_calls(other):
    assert not taken(call(**other))


@pytest.mark.parametrize(
    "options", [name for name in OPTIONS if name not in ("plain", "causal", "causal bottom-right")]
)
def test_leaves_options(options):
    assert not taken(call(**OPTIONS[options]))


def test_leaves_scales_that_turn_the_order():
    case = call()
    for scale in (0.0, -1.0):
        assert not takes(90, case.tensors, case.options._replace(scale=scale))


@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("how", LAYOUTS)
def test_leaves_strides_that_tma_does_not_read(how, which):
    case = make_case(torch.float16, B=2, Hq=2, Hkv=2, L=512, S=512, D=64)
    laid = case.tensors._replace(**{which: laid_out(getattr(case.tensors, which), how)})
    assert takes(90, laid, case.options) == (how == "heads last")


def test_reads_what_lies_together():
    joint = torch.zeros(2, 512, 3, 4, 64, dtype=torch.float16)
    q, k, v = joint.permute(2, 0, 3, 1, 4)
    assert all(map(readable, (q, k, v))) and takes(90, Tensors(q, k, v), call().options)
    assert not readable(torch.zeros(2, 2, 512, 68, dtype=torch.float16)[..., :64])  # rows of 136 bytes
    assert readable(torch.zeros(2, 2, 512, 72, dtype=torch.float16)[..., :64])


def test_batch_and_heads_do_not_count():
    """A sequence gives the same bits in any batch."""
    for sizes in ({"B": 1, "Hq": 1, "Hkv": 1}, {"B": 7, "Hq": 1, "Hkv": 1}, {"B": 1, "Hq": 6, "Hkv": 2}):
        assert taken(make_case(torch.float16, **sizes, L=512, S=512, D=64))


@pytest.fixture
def ran(monkeypatch):
    """The modules whose kernels were asked for; calls are taken for those of a GPU, and none runs."""
    found = []
    for module in (attention, attention_backward, hopper, hopper_backward):
        name = "backward" if module.__name__.endswith("backward") else "forward"
        monkeypatch.setattr(module, name, lambda *_, module=module: found.append(module))
    monkeypatch.setattr(serve, "architecture", lambda _: 90)
    monkeypatch.setattr(serve.triton.knobs.runtime, "interpret", False)
    return found


def serve_both(case: Case) -> None:
    t, o = case.tensors, case.options
    outs = empty_outputs(t, o)
    serve.forward(t, o, *outs)
    serve.backward(t, o, *case.grads, *outs[:2], empty_gradients(t, BOTH), BOTH)


def test_dispatch(ran, monkeypatch):
    serve_both(call())
    assert ran == [hopper, hopper_backward]
    portable = [attention, attention_backward]
    with tuning_cache.forced({}, portable=True):
        serve_both(call())
    assert ran[2:] == portable
    serve_both(call(softcap=1.0))
    assert ran[4:] == portable
    monkeypatch.setattr(serve.triton.knobs.runtime, "interpret", True)
    serve_both(call())
    assert ran[6:] == portable


def test_an_output_that_tma_cannot_write(ran):
    t, o = call().tensors, call().options
    output, lse, shares = empty_outputs(t, o)
    serve.forward(t, o, laid_out(output, "offset"), lse, shares)
    assert ran == [attention]


@pytest.fixture
def lacking(monkeypatch):
    """A Triton without what the kernels for Hopper import."""

    def fails(name):
        raise ImportError(f"{name} needs what is not there")

    serve.hopper.cache_clear()
    monkeypatch.setattr(serve, "import_module", fails)
    monkeypatch.setattr(serve, "_unfit", set())
    yield
    serve.hopper.cache_clear()


def test_an_import_that_fails_warns_once_and_leaves_the_portable_kernels(ran, lacking):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            serve_both(call())
    assert ran == 3 * [attention, attention_backward]
    assert [each.category for each in seen] == 2 * [RuntimeWarning]  # one for each module
    for name, each in zip(("hopper", "hopper_backward"), seen):
        assert f"seqkern.kernels.{name} needs what is not there" in str(each.message)
        assert "the portable ones run instead" in str(each.message)


# What the compiler makes of them


@pytest.mark.parametrize("length", [512, pytest.param(517, marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [pytest.param("", marks=pytest.mark.slow), "top-left"])
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "keys", "queries", "rows"])
def test_compiles(kernel, D, causal, length):
    case = call(D=D, causal=causal, L=length, S=length)
    t, o = case.tensors, case.options
    output, lse, _ = empty_outputs(t, o)
    if kernel == "forward":
        each = hopper.forward_launch(t, o, output, lse)
    else:
        rest = (*case.grads, output, lse, empty_gradients(t, BOTH), BOTH)
        made = hopper_backward.backward_launches(t, o, *rest)
        each = next(x for x in made if x.kernel.fn.__name__ == f"{kernel}_kernel")
    found = resources(each, 90)
    # Blocks of 192 queries leave too few registers for what is kept between blocks of a causal call: it is spilled
    # outside the loops over keys.
    assert found.spills <= (120 if (kernel, D, causal) == ("forward", 64, "top-left") else 0), found
    assert found.shared <= SHARED_LIMIT[90], found
    if kernel != "rows":
        code = compiled(each, 90)
        assert found.tensor == "HGMMA" and "UTMALDG" in listing(code)
        assert "serialized" not in complaints(code, 90)


def test_a_kernel_that_fails_to_compile_warns_once_and_leaves_the_portable_kernels(ran, monkeypatch):
    def fails(*arguments):
        raise triton.CompilationError("", None, "module has no attribute 'thread_barrier'")

    monkeypatch.setattr(serve, "_unfit", set())
    monkeypatch.setattr(hopper, "forward", fails)
    with pytest.warns(RuntimeWarning, match="thread_barrier"):
        serve_both(call())
    serve_both(call())
    assert ran == 2 * [attention, hopper_backward]


# What they compute


def backward(grad_output, grad_lse, _, output, lse, *rest):
    """`run_triton_backward` by the kernels for Hopper, without a choice, into poisoned memory."""
    t, o = split(rest[: -len(NEEDS)])
    outs = empty_gradients(t, BOTH)
    for x in outs:
        x.fill_(torch.nan)
    hopper_backward.backward(t, o, grad_output, grad_lse, output, lse, outs, BOTH)
    return outs


def forward(*arguments):
    """`run_triton` by the kernel for Hopper, without a choice, into poisoned memory."""
    t, o = split(arguments)
    outs = empty_outputs(t, o)
    for x in outs:
        x.fill_(torch.nan)
    assert serve.by_hopper(t, o, "hopper") and readable(outs[0])
    with torch.cuda.device_of(t.query):
        hopper.forward(t, o, *outs[:2])
    return outs


kernels = (forward, backward)


@interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
@pytest.mark.parametrize(
    ("L", "S", "D", "causal"),
    [
        (70, 130, 64, "top-left"),
        (70, 130, 64, "bottom-right"),
        (130, 70, 64, "bottom-right"),  # rows that see no key
        (65, 129, 64, ""),
        (66, 66, 128, "top-left"),
    ],
)
def test_backward_interpreted(L, S, D, causal):
    check(call(torch.float16, L=L, S=S, D=D, causal=causal), run_triton, backward)


def with_unseen_nan(case: Case) -> Case:
    """The case with NaN in the keys that no query sees by their place, of a causal call from the top left."""
    t = case.tensors
    key, value = t.key.clone(), t.value.clone()
    for x in (key, value):
        x[:, :, t.query.shape[2] :] = torch.nan
    return Case(t._replace(key=key, value=value), case.options, case.grads)


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@interpreter
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning")
def test_unseen_keys_interpreted():
    case = call(torch.float16, L=70, S=150, causal="top-left")
    assert_same(run(with_unseen_nan(case), run_triton, backward), run(case, run_triton, backward))


def on_gpu(dtype=torch.bfloat16, **sizes) -> Case:
    return make_case(dtype, **{"B": 1, "Hq": 4, "Hkv": 2, "D": 64} | sizes).on("cuda")


LENGTHS = [(512, 512), (517, 1000), (1000, 517), (2049, 640)]


@gpu
@pytest.mark.parametrize(("L", "S"), LENGTHS)
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("D", [64, 128])
def test_meets_the_oracle(D, causal, L, S):
    check(on_gpu(L=L, S=S, D=D, causal=causal, B=2), *kernels)


@gpu
@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("D", [64, 128])
def test_meets_the_oracle_in_float16(D, causal):
    check(on_gpu(torch.float16, L=777, S=1111, D=D, causal=causal), *kernels)


@gpu
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1), (3, 3)], ids=str)
def test_heads(heads):
    Hq, Hkv = heads
    check(on_gpu(B=3, Hq=Hq, Hkv=Hkv, L=600, S=700, D=128, causal="bottom-right"), *kernels)


@gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_any_length(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    groups, Hkv = draw(1, 4), draw(1, 4)
    sizes = {"B": draw(1, 3), "Hq": groups * Hkv, "Hkv": Hkv, "L": draw(512, 1500), "S": draw(512, 1500)}
    dtype = (torch.float16, torch.bfloat16)[seed % 2]
    check(on_gpu(dtype, **sizes, D=(64, 128)[seed // 2 % 2], causal=CAUSAL[seed % 3], seed=seed), *kernels)


@gpu
@pytest.mark.parametrize("causal", ["top-left", ""])
@pytest.mark.parametrize("D", [64, 128])
def test_many_blocks_give_the_same_bits_twice(D, causal):
    """More blocks of queries than multiprocessors, held against the portable kernels; races would show here."""
    case = on_gpu(B=4, Hq=16, Hkv=8, L=2049, S=2049, D=D, causal=causal)
    first = run(case, *kernels)
    for _ in range(3):
        assert_same(run(case, *kernels), first)
    with tuning_cache.forced({}, portable=True):
        portable = run(case)
    for name, want in portable.items():
        assert relative_rms(first[name], want) < 2 * torch.finfo(torch.bfloat16).eps, name


@gpu
@pytest.mark.parametrize("D", [64, 128])
def test_a_sequence_is_the_same_in_any_batch(D):
    case = on_gpu(B=3, Hq=8, Hkv=4, L=700, S=900, D=D, causal="top-left")
    every = run(case, *kernels)
    few = {"q": slice(4, 6), "kv": slice(2, 3)}

    def part(x, which):
        return x[1:2, few[which]]

    t = Tensors(*(part(x, which) for x, which in zip(case.tensors[:3], ("q", "kv", "kv"))))
    alone = run(Case(t, case.options, tuple(part(g, "q") for g in case.grads)), *kernels)
    sides = {"d_key": "kv", "d_value": "kv"}
    assert_same(alone, {name: part(x, sides.get(name, "q")) for name, x in every.items()})


@gpu
@pytest.mark.parametrize(("L", "S"), [(517, 1000), (576, 700)])
@pytest.mark.parametrize("D", [64, 128])
def test_keys_that_no_query_sees_may_be_nan(D, L, S):
    case = on_gpu(L=L, S=S, D=D, causal="top-left")
    assert_same(run(with_unseen_nan(case), *kernels), run(case, *kernels))


@gpu
def test_strides():
    case = on_gpu(B=2, Hq=2, Hkv=2, L=530, S=530, D=128, causal="top-left")
    want = run(case, *kernels)
    t = Tensors(*(laid_out(x, "heads last") for x in case.tensors[:3]))
    grads = (
        laid_out(case.grads[0], "heads last"),
        case.grads[1].transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert_same(run(Case(t, case.options, grads), *kernels), want)
    joint = torch.stack([x.transpose(1, 2) for x in case.tensors[:3]], 2)
    t = Tensors(*(x.transpose(1, 2) for x in joint.unbind(2)))
    assert_same(run(Case(t, case.options, case.grads), *kernels), want)
    for how in ("rows last", "gapped", "offset"):  # of a gradient, which is copied
        laid = (laid_out(case.grads[0], how), case.grads[1])
        assert_same(run(Case(case.tensors, case.options, laid), *kernels), want)


@gpu
def test_gradients_that_are_not_there_or_expanded():
    case = on_gpu(L=530, S=530, causal="top-left")
    arguments = (*case.tensors, *case.options)
    output, lse, _ = forward(*arguments)
    zeros, ones = torch.zeros_like(case.grads[0]), torch.ones_like(case.grads[0])
    of_output, of_lse = case.grads
    pairs = [
        ((None, of_lse), (zeros, of_lse)),
        ((of_output, None), (of_output, torch.zeros_like(lse))),
        ((ones[:1, :1, :1, :1].expand_as(ones), None), (ones, None)),
        ((ones, lse.new_ones(1, 1, 1).expand_as(lse)), (ones, torch.ones_like(lse))),
    ]
    for pair in pairs:
        got, want = (backward(*grads, None, output, lse, *arguments, *BOTH)[:3] for grads in pair)
        assert all(map(torch.equal, got, want))


@gpu
@pytest.mark.parametrize("needed", NEEDS[:2])
def test_only_what_is_needed(needed):
    case = on_gpu(L=530, S=530, causal="top-left")
    arguments = (*case.tensors, *case.options)
    output, lse, _ = torch.ops.seqkern.attention(*arguments)

    def gradients(needs):
        return torch.ops.seqkern.attention_backward(*case.grads, None, output, lse, *arguments, *needs)

    every = gradients(BOTH)
    owner = ["need_query", "need_key_value", "need_key_value"]
    for name, got, want in zip(owner, gradients([n == needed for n in NEEDS]), every):
        assert torch.equal(got, want) if name == needed else got.shape == (0,)


@gpu
@pytest.mark.parametrize("which", ["query", "key", "value", "grad_output"])
def test_offsets_beyond_32_bits(which):
    case = on_gpu(Hq=1, Hkv=1, L=530, S=530, causal="top-left")
    want = run(case, *kernels)
    far = 2**22 + 8  # 529 rows apart lie past 2^31 elements; only the rows themselves are ever touched

    def spread(x):
        wide = torch.empty(far * 529 + 64, dtype=x.dtype, device="cuda").as_strided(x.shape, (64, 64, far, 1))
        return wide.copy_(x)

    t, grads = case.tensors, case.grads
    if which == "grad_output":
        grads = (spread(grads[0]), grads[1])
    else:
        t = t._replace(**{which: spread(getattr(t, which))})
    arguments = (*t, *case.options)
    output, lse, _ = forward(*arguments)
    assert torch.equal(output, want["output"])
    for name, got in zip(Tensors._fields, backward(*grads, None, output, lse, *arguments, *BOTH)[:3]):
        assert torch.equal(got, want[f"d_{name}"]), name


@gpu
@pytest.mark.parametrize("D", [64, 128])
def test_the_op_goes_this_way(D):
    case = on_gpu(L=600, S=700, D=D, causal="bottom-right")
    assert_same(run(case), run(case, *kernels))
    with (
        mock.patch.object(hopper, "forward", wraps=hopper.forward) as ahead,
        mock.patch.object(hopper_backward, "backward", wraps=hopper_backward.backward) as back,
    ):
        run(case)
        with tuning_cache.forced({}, portable=True):
            run(case)
    assert ahead.call_count == back.call_count == 1


@gpu
@pytest.mark.parametrize("D", [64, 128])
def test_a_captured_graph_replays(D):
    case = on_gpu(B=2, Hq=16, Hkv=16, L=1030, S=1030, D=D, causal="top-left")
    arguments = (*case.tensors, *case.options)

    def both():
        output, lse, _ = torch.ops.seqkern.attention(*arguments)
        found = torch.ops.seqkern.attention_backward(*case.grads, None, output, lse, *arguments, *BOTH)
        return [output, lse, *found[:3]]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(2):
        for x in case.tensors[:3]:
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, both()))
