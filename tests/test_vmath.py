"""The vector functions to the last places of their whole range, and the matrix product, on every instruction set."""

import numpy as np
import pytest
import torch

from seqkern.ops import _library

NATIVE = _library.native()
ISAS = NATIVE.isas() if NATIVE else ["none"]
ULPS = {"exp": 1.1, "sigmoid": 2.5, "tanh": 3, "exp2": 1.7}
pytestmark = [pytest.mark.native, pytest.mark.built]


@pytest.fixture(params=ISAS)
def native(request):
    assert NATIVE is not None
    NATIVE.force_isa(request.param)
    yield NATIVE
    NATIVE.force_isa(None)


def exact(name, x):
    with np.errstate(over="ignore", under="ignore"):
        if name == "exp":
            return np.exp(x)
        if name == "tanh":
            return np.tanh(x)
        if name == "exp2":
            return np.exp2(x)
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, 1, e) / (1 + e)


def whole_range(dtype):
    """Every 4099th float32 pattern, NaN left out, a dense grid where the functions bend, and the ends."""
    bits = np.arange(0, 2**32, 4099, dtype=np.uint64).astype(np.uint32).view(np.float32)
    bits = bits[~np.isnan(bits)]
    grid = np.linspace(-110, 110, 400_001)
    small = np.geomspace(1e-8, 1, 20_001)
    info = np.finfo(dtype)
    ends = np.array([0.0, -0.0, np.inf, -np.inf, info.max, info.min, info.tiny, info.smallest_subnormal])
    return np.concatenate([bits, grid, small, -small, ends]).astype(dtype)


@pytest.mark.parametrize("name", ULPS)
def test_float32_ulp(native, name):
    x = whole_range(np.float32)
    x = x[x <= 0] if name == "exp2" else x  # which attention's scores are, beside the largest
    got, want = native.vmath(name, x), exact(name, x.astype(np.longdouble))
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float32)
    finite = np.isfinite(rounded)
    assert np.array_equal(got[~finite], rounded[~finite])
    unit = np.spacing(np.maximum(np.abs(rounded[finite]), np.finfo(np.float32).tiny))
    error = np.abs(got[finite] - want[finite])
    error = (
        np.where(error <= np.finfo(np.float32).tiny, 0, error) / unit
    )  # below it, a result may be flushed to 0
    worst = error.argmax()
    assert error[worst] <= ULPS[name], f"{error[worst]:.2f} ulp at {x[finite][worst]!r}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ends_and_symmetry(native, dtype):
    x = np.array([-np.inf, -0.0, 0.0, np.inf, np.nan], dtype)
    ends = {"exp": [0, 1, 1, np.inf], "sigmoid": [0, 0.5, 0.5, 1], "tanh": [-1, 0, 0, 1], "exp2": [0, 1, 1]}
    for name, want in ends.items():
        got = native.vmath(name, x)
        assert np.array_equal(got[: len(want)], want)
        assert np.isnan(got[4])
    tanh = native.vmath("tanh", whole_range(dtype))
    assert np.array_equal(native.vmath("tanh", -whole_range(dtype)), -tanh)
    assert np.abs(tanh).max() <= 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 5, 7), (13, 31, 33), (15, 33, 1), (29, 65, 1030), (2, 3, 2049)]
    + [(0, 3, 4), (3, 0, 4), (3, 4, 0)],
    ids=str,
)
def test_matrix_product(native, dtype, shape):
    m, n, k = shape
    random = np.random.default_rng(0)
    a, b = random.standard_normal((m, k)).astype(dtype), random.standard_normal((k, n)).astype(dtype)
    wide = a.astype(np.longdouble) @ b.astype(np.longdouble)
    bound = (np.abs(a).astype(np.longdouble) @ np.abs(b)) * np.finfo(dtype).eps * (2 + k)
    got = native.gemm(a, b)
    assert got.shape == (m, n)
    assert (np.abs(got - wide) <= bound).all()


def rounded(x):
    """The bits of the nearest bfloat16 of each float32, as torch rounds."""
    return torch.from_numpy(x).bfloat16().view(torch.uint16).numpy()


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("source", ["float", "bfloat"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (3, 5, 7), (13, 31, 33), (15, 33, 1), (29, 65, 2054), (2, 3, 4097)]
    + [(1, 129, 64), (1, 97, 34), (5, 96, 62), (0, 3, 4), (3, 0, 4), (3, 4, 0)],
    ids=str,
)
def test_bfloat16_product(native, shape, source, transposed):
    m, n, k = shape
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n)))
    wide_a, bits = widened(rounded(a)).astype(np.float64), rounded(b)
    wide_b = widened(bits).astype(np.float64)
    bound = np.abs(wide_a) @ np.abs(wide_b) * np.finfo(np.float32).eps * (2 + k)
    given = bits if source == "bfloat" else b
    got = native.gemm_bf16(a, np.ascontiguousarray(given.T) if transposed else given, transposed)
    assert got.shape == (m, n)
    assert (np.abs(got - wide_a @ wide_b) <= bound).all()


def test_bfloat16_product_of_ends(native):
    """NaN and infinity travel; a subnormal number counts as itself or as zero."""
    tiny = np.float32(2.0**-130)
    a = np.array([[1, np.nan], [np.inf, 1], [np.inf, -np.inf], [tiny, 0], [1, 2]], np.float32)
    got = native.gemm_bf16(a, np.ones((2, 1), np.float32))[:, 0]
    assert np.isnan(got[[0, 2]]).all()
    assert got[1] == np.inf and 0 <= got[3] <= tiny and got[4] == 3
