"""functional.linear: torch's results on every backend and instruction set, and the rows for which it is ours."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern.functional import linear
from seqkern.ops import _backend, _hardware, _linear_backends
from seqkern.testing import DTYPES, on_threads, poison, relative_rms, tolerance, worst

ROWS = (1, 2, 3, 4, 5, 8, 17, 61)
SIZES = [(1, 1), (3, 5), (16, 16), (17, 33), (100, 7), (512, 70), (65, 130), (1100, 40)]
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "gelu": F.gelu}


def case(rows, K, N, dtype, bias=True):
    tensors = torch.randn(rows, K), torch.randn(N, K), torch.randn(N) if bias else None
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def wide(tensors):
    return tuple(t if t is None else t.double() for t in tensors)


def hold(got, tensors, function=F.linear):
    exact, theirs = function(*wide(tensors)), function(*tensors)
    assert (got.shape, got.dtype) == (theirs.shape, theirs.dtype)
    error, allowed = relative_rms(got, exact), tolerance(got.dtype, relative_rms(theirs, exact))
    assert error <= allowed, f"{error:.3g} > {allowed:.3g} at {worst(got, exact)}"


@pytest.mark.native
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_torch(run_on, dtype, bias):
    for K, N in SIZES:
        for rows in ROWS:
            tensors = case(rows, K, N, dtype, bias)
            poison(torch.empty(rows, N, dtype=dtype))
            hold(linear(*tensors), tensors)


@pytest.mark.native
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_activation_behind_it(run_on, dtype, activation):
    for rows in (1, 3, 40):
        tensors = case(rows, 33, 70, dtype)
        poison(torch.empty(rows, 70, dtype=dtype))
        got = linear(*tensors, activation)
        hold(got, tensors, lambda *tensors: ACTIVATIONS[activation](F.linear(*tensors)))


@pytest.mark.native
@pytest.mark.built
def test_gelu_keeps_the_digits_of_its_tails():
    x = torch.cat([torch.linspace(-13, 13, 20001), torch.tensor([0.0, -0.0, 100.0, -100.0])])
    with seqkern.backend("cpu"):
        for rows in (x.view(-1, 1), x.view(1, -1).T[: _linear_backends.FEW_ROWS]):
            got = linear(rows, torch.ones(1, 1), activation="gelu")
            wide = rows.double()
            exact = wide / 2 * torch.special.erfc(-wide / 2**0.5)
            allowed = (4e-7 + 2e-7 * wide**2) * exact.abs() + 1e-37  # x^2 / 2 is rounded before exp
            assert ((got - exact).abs() <= allowed).all()


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_any_layout(run_on, dtype):
    """As gradients need them: each factor by rows, by columns, or in pieces."""
    for R, K, C in ((1, 1, 1), (5, 3, 2), (61, 34, 70), (33, 1100, 20), (130, 17, 33)):
        a, b = torch.randn(R, K).to(dtype), torch.randn(K, C).to(dtype)
        for layout_a, layout_b in (
            (0, 0),
            (0, 1),
            (1, 0),
            (1, 1),
            (2, 2),
            (3, 0),
            (1, 3),
            (4, 1),
            (0, 4),
            (5, 5),
        ):
            tensors = laid(a, layout_a), laid(b, layout_b)
            poison(torch.empty(R, C, dtype=dtype))
            hold(
                torch.ops.seqkern.mm.default(*tensors) if run_on != "torch" else torch.mm(*tensors),
                tensors,
                torch.mm,
            )


def laid(x, layout):
    """By rows, by columns, in pieces, or one row, one column or one number of it expanded."""
    if layout == 0:
        return x
    if layout == 5:
        # Sums of equal terms err alike, more with one library's order than with another's: these are exact.
        x = torch.full_like(x, 0.75)
    if layout > 2:
        rows, columns = slice(None if layout == 4 else 1), slice(None if layout == 3 else 1)
        return x[rows, columns].contiguous().expand(x.shape)
    return x.T.contiguous().T if layout == 1 else x.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2]


@pytest.mark.native
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3), (1, 1, 2)], ids=str)
def test_any_rank(run_on, lead):
    weight, bias = torch.randn(9, 20), torch.randn(9)
    x = torch.randn(*lead, 20)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_any_strides(run_on):
    x = torch.randn(20, 3).T
    for weight in (
        torch.randn(30, 20)[::2],
        torch.randn(20, 15).T,
        torch.randn(15, 40)[:, 7:27],
        torch.randn(20).expand(15, 20),
        torch.randn(15, 1).expand(15, 20),
        torch.randn(()).expand(15, 20),
    ):
        for bias in (torch.randn(30)[::2], torch.randn(1).expand(15)):
            for input in (
                x,
                torch.cat([x] * 9),
                torch.randn(20).expand(30, 20),
                torch.randn(30, 1).expand(30, 20),
            ):
                torch.testing.assert_close(
                    linear(input, weight, bias), F.linear(input, weight, bias), rtol=1e-4, atol=1e-5
                )


@pytest.mark.native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("over", [0, 1, 2, (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_gradients_that_sums_expand(run_on, over, dtype):
    """The gradient of a sum has strides of 0, of rows or of columns."""
    tensors = [t.requires_grad_() for t in (torch.randn(3, 40, 33).to(dtype), *case(1, 33, 50, dtype)[1:])]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    sums = [
        function(*at).sum(over)
        for function, at in ((linear, tensors), (F.linear, tensors), (F.linear, exact))
    ]
    factors = torch.randn(sums[0].shape).to(dtype)
    found = [
        torch.autograd.grad((total * factors.to(total.dtype)).sum(), at)
        for total, at in zip(sums, (tensors, tensors, exact))
    ]
    for got, theirs, wide in zip(*found):
        error, allowed = relative_rms(got, wide), tolerance(dtype, relative_rms(theirs, wide))
        assert error <= allowed, f"{error:.3g} > {allowed:.3g}"


def test_relu_hands_on_the_gradient_of_a_nan():
    x = torch.tensor([[torch.nan], [-1.0], [0.0], [2.0]])
    bias = torch.zeros(1, requires_grad=True)
    with seqkern.backend("cpu" if _hardware.CPU_READY else None):
        got = torch.autograd.grad(linear(x, torch.ones(1, 1), bias, "relu").sum(), bias)
    want = torch.autograd.grad(F.relu(F.linear(x, torch.ones(1, 1), bias)).sum(), bias)
    assert torch.equal(got[0], want[0])


@pytest.mark.native
@pytest.mark.built
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_among_others_and_on_any_number_of_threads(dtype, many):
    rows = 300 if many else _linear_backends.few_rows(dtype)
    x, weight, bias = case(rows, 70, 900, dtype)
    with seqkern.backend("cpu"):
        found = on_threads(lambda: linear(x, weight, bias))
        assert all(torch.equal(found[0], other) for other in found[1:])
        parts = x.split(_linear_backends.few_rows(dtype) + 13 if many else 1)
        assert torch.equal(
            found[0],
            torch.cat([linear(part, weight, bias) for part in parts[:-1]] + [found[0][-len(parts[-1]) :]]),
        )


@pytest.mark.native
def test_what_is_not_finite(run_on):
    x, weight, bias = case(3, 20, 40, torch.float32)
    x[0, 3], x[1, 4], weight[5, 6] = torch.nan, torch.inf, -torch.inf
    got, want = linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())


BAD = {
    "features": (torch.zeros(2, 3), torch.zeros(4, 5), None),
    "weight of three dimensions": (torch.zeros(2, 3), torch.zeros(2, 4, 3), None),
    "bias": (torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(5)),
    "dtypes": (torch.zeros(2, 3), torch.zeros(4, 3).double(), None),
    "no dimension": (torch.zeros(()), torch.zeros(4, 3), None),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_torchs(name):
    with pytest.raises(Exception) as theirs:
        F.linear(*BAD[name])
    with pytest.raises(theirs.type):
        linear(*BAD[name])


def test_an_unknown_activation():
    with pytest.raises(ValueError, match="'tanh', expected 'relu', 'gelu' or None"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3), activation="tanh")


def test_what_torch_takes_beside_a_linear_layer():
    vector = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(linear(*vector), F.linear(*vector))
    spread = torch.randn(2, 3), torch.randn(4, 3), torch.randn(1)
    torch.testing.assert_close(linear(*spread), F.linear(*spread))
    assert linear(torch.zeros(2, 0), torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 2


def chosen(*tensors):
    return _backend.pick(_backend.Call("linear", tensors))


@pytest.mark.built
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whose_rows_are_whose(dtype, dense, monkeypatch):
    monkeypatch.setattr(_linear_backends, "DENSE", dense)
    monkeypatch.setattr(_linear_backends, "BF16_DOT", True)
    monkeypatch.setattr(_linear_backends, "TERM_BY_TERM", frozenset())
    monkeypatch.setattr(_linear_backends, "CONVERTED", frozenset())
    most = _linear_backends.few_rows(dtype)
    fewest, next_, many = (case(rows, 500, 500, dtype) for rows in (most, most + 1, 600))
    assert chosen(*fewest).name == "cpu"
    hold(linear(*fewest), fewest)
    packed = dense and dtype in (torch.float32, torch.bfloat16)
    assert chosen(*next_).name == "torch"  # 8.5 MFLOP at most
    assert chosen(*many).name == ("cpu" if packed and dtype is torch.float32 else "torch")
    assert chosen(*case(400, 500, 500, dtype)).name == ("cpu" if packed else "torch")
    assert chosen(*case(1, 500, 499, dtype)).name == "torch"
    if not dense:
        assert chosen(*next_).declined == (
            ("cpu", "a linear layer of many rows is faster on torch's kernel"),
        )
    for tensors, name in ((fewest, "torch"), (many, "cpu" if packed and dtype is torch.float32 else "torch")):
        needing = tensors[0].clone().requires_grad_(), *tensors[1:]
        assert chosen(*needing).name == name
        assert linear(*needing).requires_grad
        with torch.no_grad():
            assert chosen(*needing).name == chosen(*tensors).name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(*fewest).name == "torch"
        assert linear(*fewest).dtype == F.linear(*fewest).dtype


@pytest.mark.built
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        (torch.bfloat16, "TERM_BY_TERM"),
        (torch.float16, "TERM_BY_TERM"),
        (torch.bfloat16, "CONVERTED"),
    ],
    ids=str,
)
def test_sixteen_bits_where_torch_has_no_dots(dtype, how, monkeypatch):
    for each in ("TERM_BY_TERM", "CONVERTED"):
        monkeypatch.setattr(_linear_backends, each, frozenset((dtype,) if each == how else ()))
    for rows in (8, 600):
        tensors = case(rows, 500, 500, dtype)
        assert chosen(*tensors).name == "cpu"
        assert chosen(tensors[0].clone().requires_grad_(), *tensors[1:]).name == "cpu"
        assert _linear_backends.gradient_of_weights_is_ours(rows, dtype)
    small = case(8, 100, 100, dtype)
    assert chosen(*small).name == "torch"
    assert chosen(small[0].clone().requires_grad_(), *small[1:]).name == "torch"


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_memory_of_others_is_not_written_again(activation):
    """An activation behind torch's product is done in place, unless somebody may still read what was before it."""
    tensors = case(40, 30, 20, torch.float32)
    want = ACTIVATIONS[activation](F.linear(*tensors))

    class Keeps(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func is F.linear:
                kept.append((found, found.clone()))
            return found

    class Cached(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return cached if func is F.linear else super().__torch_function__(func, types, args, kwargs)

    kept = []
    cached = F.linear(*tensors)
    before = cached.clone()
    with torch.no_grad():
        with Keeps():
            torch.testing.assert_close(linear(*tensors, activation), want)
        torch.testing.assert_close(linear(tensors[0].as_subclass(Cached), *tensors[1:], activation), want)
        torch.testing.assert_close(linear(*tensors, activation), want)
    assert kept and all(torch.equal(*pair) for pair in kept)
    assert torch.equal(cached, before)
    if torch.backends.mkldnn.is_available():
        with torch.no_grad():
            found = linear(*(t.to_mkldnn() for t in tensors), activation)
        torch.testing.assert_close(found.to_dense(), want)


@pytest.mark.built
def test_a_torch_that_does_not_tell_what_onednn_has():
    def missing():
        raise AttributeError

    assert _linear_backends._by_onednn(None) and _linear_backends._by_onednn(missing)
    assert not _linear_backends._by_onednn(lambda: False)


@pytest.mark.native
@pytest.mark.built
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [3, _linear_backends.ROWS_WORTH_A_GRADIENT + 3])
def test_gradients(rows, activation):
    for dtype in DTYPES:
        tensors = case(rows, 33, 40, dtype)
        dy = torch.randn(rows, 40).to(dtype)

        def gradients(function, tensors, dy):
            leaves = [t.clone().requires_grad_() for t in tensors]
            function(*leaves).backward(dy)
            return [t.grad for t in leaves]

        def theirs(*tensors):
            return ACTIVATIONS[activation](F.linear(*tensors))

        with seqkern.backend("cpu"):
            got = gradients(lambda *t: linear(*t, activation), tensors, dy)
        exact, of_torch = gradients(theirs, wide(tensors), dy.double()), gradients(theirs, tensors, dy)
        for ours, right, their in zip(got, exact, of_torch):
            assert relative_rms(ours, right) <= tolerance(dtype, relative_rms(their, right))


@pytest.mark.built
def test_the_op_is_whole():
    x, weight, bias = (t.requires_grad_() for t in case(3, 5, 4, torch.float64))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (x, weight, None))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (x, weight, bias, 1))
    single = tuple(t.detach().float().requires_grad_() for t in (x, weight, bias))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (*single, 2))
    torch.library.opcheck(torch.ops.seqkern.mm.default, (x, weight.detach().T.requires_grad_()))
    with seqkern.backend("cpu"):
        assert torch.autograd.gradcheck(linear, (x[None], weight, bias))
        assert torch.autograd.gradgradcheck(linear, (x, weight, bias))
        for activation in ("relu", "gelu"):
            assert torch.autograd.gradcheck(partial(linear, activation=activation), (x, weight, bias))
            assert torch.autograd.gradgradcheck(partial(linear, activation=activation), (x, weight, bias))


def test_transforms_and_compilers():
    x, weight, bias = case(3, 5, 4, torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(linear, (0, None, None))(x, weight, bias), F.linear(x, weight, bias)
    )
    along = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))[1]
    torch.testing.assert_close(along, x @ weight.T)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
