"""functional.linear: torch's results on every backend and instruction set, and the rows for which it is ours."""

import pytest
import torch
import torch.nn.functional as F

import seqkern
from seqkern.functional import linear
from seqkern.ops import _backend
from seqkern.testing import DTYPES, poison, relative_rms, tolerance, worst

ROWS = (1, 2, 3, 4, 5, 8, 17)
SIZES = [(1, 1), (3, 5), (16, 16), (17, 33), (100, 7), (512, 70), (65, 130)]


def case(rows, K, N, dtype, bias=True):
    tensors = torch.randn(rows, K), torch.randn(N, K), torch.randn(N) if bias else None
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def wide(tensors):
    return tuple(t if t is None else t.double() for t in tensors)


def hold(got, tensors):
    exact, theirs = F.linear(*wide(tensors)), F.linear(*tensors)
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
@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3), (1, 1, 2)], ids=str)
def test_any_rank(run_on, lead):
    weight, bias = torch.randn(9, 20), torch.randn(9)
    x = torch.randn(*lead, 20)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5)


@pytest.mark.native
def test_any_strides(run_on):
    x = torch.randn(20, 3).T
    for weight in (torch.randn(30, 20)[::2], torch.randn(20, 15).T, torch.randn(15, 40)[:, 7:27]):
        for bias in (torch.randn(30)[::2], torch.randn(1).expand(15)):
            torch.testing.assert_close(
                linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-5
            )


@pytest.mark.native
@pytest.mark.built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_among_others_and_on_any_number_of_threads(dtype):
    x, weight, bias = case(11, 70, 900, dtype)
    threads, found = torch.get_num_threads(), []
    with seqkern.backend("cpu"):
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found.append(linear(x, weight, bias))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(found[0], other) for other in found[1:])
        assert torch.equal(found[0], torch.stack([linear(row, weight, bias) for row in x]))


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


def test_what_torch_takes_beside_a_linear_layer():
    vector = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(linear(*vector), F.linear(*vector))
    spread = torch.randn(2, 3), torch.randn(4, 3), torch.randn(1)
    torch.testing.assert_close(linear(*spread), F.linear(*spread))
    assert linear(torch.zeros(2, 0), torch.zeros(3, 0)).tolist() == [[0.0] * 3] * 2


def chosen(*tensors):
    with _backend.watch() as seen:
        linear(*tensors)
    return seen[-1][1]


@pytest.mark.built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whose_rows_are_whose(dtype):
    most = _backend.FEW_ROWS if dtype.itemsize > 2 else _backend.FEW_ROWS_OF_16_BITS
    few, many = (case(rows, 500, 500, dtype) for rows in (most, most + 1))
    assert chosen(*few).name == "cpu"
    hold(linear(*few), few)
    assert chosen(*many) == ("torch", (("cpu", "a linear layer of many rows is faster on torch's kernel"),))
    assert chosen(*case(1, 500, 499, dtype)).name == "torch"
    needing = few[0].clone().requires_grad_(), *few[1:]
    assert chosen(*needing).name == "torch"
    assert linear(*needing).requires_grad
    with torch.no_grad():
        assert chosen(*needing).name == "cpu"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert chosen(*few).name == "torch"
        assert linear(*few).dtype == F.linear(*few).dtype


@pytest.mark.built
def test_the_op_is_whole():
    x, weight, bias = (t.requires_grad_() for t in case(3, 5, 4, torch.float64))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (x, weight, bias))
    torch.library.opcheck(torch.ops.seqkern.linear.default, (x, weight, None))
    with seqkern.backend("cpu"):
        assert torch.autograd.gradcheck(linear, (x[None], weight, bias))
        assert torch.autograd.gradgradcheck(linear, (x, weight, bias))


def test_transforms_and_compilers():
    x, weight, bias = case(3, 5, 4, torch.float64)
    torch.testing.assert_close(
        torch.func.vmap(linear, (0, None, None))(x, weight, bias), F.linear(x, weight, bias)
    )
    along = torch.func.jvp(lambda x: linear(x, weight, bias), (x,), (x,))[1]
    torch.testing.assert_close(along, x @ weight.T)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
