"""The op with torch's arguments, and rows of few keys, which the compiled kernels do not pack."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from seqkern.ops import _library
from seqkern.spec import attention as spec
from seqkern.spec.attention import Options, Tensors
from seqkern.testing import on_threads, poison, relative_rms, tolerance
from seqkern.testing_attention import LAYOUTS, laid_out, make_case

NATIVE = _library.native()
pytestmark = [pytest.mark.native, pytest.mark.built]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = NATIVE.isas() if NATIVE else ["none"]
FEW_KEYS = [
    {"L": 1, "S": 1, "D": 8, "Dv": 3},
    {"L": 40, "S": 1, "D": 50},
    {"L": 1, "S": 2, "D": 256, "Dv": 300},
    {"L": 2, "S": 2, "D": 3},
    {"L": 1, "Hq": 4, "Hkv": 2, "S": 7, "D": 17, "Dv": 64},
    {"L": 3, "S": 8, "D": 64},
    {"L": 4, "Hq": 2, "Hkv": 1, "S": 4, "D": 33},
    {"L": 1, "S": 33, "D": 64, "Dv": 80},
    {"L": 1, "S": 48, "D": 20},
    {"L": 1, "S": 97, "D": 40},
    {"L": 1, "S": 500, "D": 8},  # narrow heads have more keys
    {"L": 1, "S": 512, "D": 16, "Dv": 5},
    {"L": 1, "S": 131, "D": 3, "Dv": 8},
    {"L": 1, "S": 513, "D": 16},
]


def sdpa(q, k, v, mask=None, causal=False, scale=None, gqa=False):
    poison(torch.empty(*q.shape[:-1], v.shape[-1], dtype=q.dtype))
    return torch.ops.seqkern.sdpa(q, k, v, mask, causal, scale, gqa)


def tensors(q, k, v, dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in (q, k, v)]


@pytest.mark.parametrize("sizes", FEW_KEYS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(  # every dtype on one instruction set, every instruction set with one dtype
    ("isa", "dtype"),
    [*((ISAS[-1], dtype) for dtype in DTYPES), *((isa, torch.float32) for isa in ISAS[:-1])],
    indirect=["isa"],
    ids=str,
)
def test_few_keys(isa, dtype, causal, sizes):
    t = make_case(dtype, **sizes).tensors
    q, k, v = t.query, t.key, t.value
    got = sdpa(q, k, v, causal=causal, gqa=True)
    arguments = {"is_causal": causal, "enable_gqa": True}
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **arguments)
    torchs = F.scaled_dot_product_attention(q, k, v, **arguments)
    assert relative_rms(got, want) <= tolerance(dtype, relative_rms(torchs, want))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize(("L", "S"), [(5, 1), (1, 1), (1, 3), (2, 3), (1, 30)])
def test_numbers_that_are_none(isa, bad, L, S):
    """As the spec, whose scores are rounded alike: in the query, in a key, in a value, one at a time."""
    for which in range(3):
        t = tensors((1, 2, L, 4), (1, 2, S, 4), (1, 2, S, 4))
        t[which][0, 1, 0, 2] = bad
        want = spec.attention(*Tensors(*t), *Options(0.5))[0]
        got = sdpa(*t, scale=0.5)
        assert torch.allclose(got, want, equal_nan=True, atol=1e-6), (which, got, want)


def test_a_compilers_output_lies_as_the_real_one():
    for query in (
        torch.randn(2, 3, 5, 8),
        torch.randn(2, 5, 3, 8).transpose(1, 2),
        torch.randn(2, 5, 8, 3).permute(0, 3, 1, 2),  # copied before it is read
        torch.randn(2, 5, 3, 1).transpose(1, 2),
    ):
        key = torch.randn(2, 3, 7, query.shape[3])
        with FakeTensorMode() as fake:
            made = sdpa(*(fake.from_tensor(t) for t in (query, key, key)))
        assert (
            made.stride()
            == sdpa(query, key, key).stride()
            == F.scaled_dot_product_attention(query, key, key).stride()
        )


def test_few_keys_behind_the_diagonal():
    """NaN in keys and values that a query does not see stays where it is."""
    q, k, v = tensors((1, 1, 3, 8), (1, 1, 3, 8), (1, 1, 3, 8))
    want = sdpa(q, k, v, causal=True)
    k[:, :, 2], v[:, :, 2] = torch.nan, torch.nan
    got = sdpa(q, k, v, causal=True)
    assert torch.equal(got[:, :, :2], want[:, :, :2]) and got[:, :, 2].isnan().all()


@pytest.mark.parametrize("sizes", [(7, 40, 1, 64, 128), (3, 4, 200, 1, 64), (8, 12, 2, 7, 64)])
def test_few_keys_on_any_number_of_threads(sizes):
    B, H, L, S, D = sizes
    q, k, v = tensors((B, H, L, D), (B, H, S, D), (B, H, S, D))
    first, *others = on_threads(lambda: sdpa(q, k, v))
    assert all(torch.equal(first, other) for other in others)


MASKS = [
    ((2, 4, 5, 30), torch.bool),
    ((2, 1, 1, 30), torch.bool),
    ((5, 30), torch.bool),
    ((30,), torch.bool),
    ((1, 4, 5, 1), torch.float32),
    ((5, 30), torch.float32),
    ((2, 4, 5, 30), None),
    ((), torch.bool),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "of"), MASKS, ids=str)
def test_masks(shape, of, dtype):
    q, k, v = tensors((2, 4, 5, 16), (2, 4, 30, 16), (2, 4, 30, 8), dtype)
    if of is torch.bool:
        mask = (torch.rand(shape) < 0.7) | (torch.arange(shape[-1] if shape else 1) == 0).view(shape[-1:])
    else:
        mask = torch.randn(shape).to(of or dtype)
    mask = mask.view(shape)
    if of is torch.float32 and dtype is torch.float64:
        assert sdpa(q, k, v, mask) is None  # the long way widens it
        return
    got = sdpa(q, k, v, mask)
    wide = mask if of is torch.bool else mask.double()
    full = wide.expand(2, 4, 5, 30)  # torch's wants two dimensions at least
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), full)
    torchs = F.scaled_dot_product_attention(q, k, v, full if of is torch.bool else full.to(dtype))
    assert relative_rms(got, want) <= tolerance(dtype, relative_rms(torchs, want))


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("how", LAYOUTS)
def test_ranks_and_layouts(rank, how):
    t = [laid_out(x, how) for x in tensors((2, 4, 20, 16), (2, 4, 30, 16), (2, 4, 30, 24))]
    for _ in range(4 - rank):
        t = [x[0] for x in t]
    got, want = sdpa(*t, causal=True), F.scaled_dot_product_attention(*t, is_causal=True)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)
    mask = laid_out(torch.randn(2, 4, 20, 30), how)
    mask = mask[(0,) * (4 - rank)]
    got = sdpa(*t, mask=mask)
    if got is None:
        assert mask.stride(-1) != 1
    else:
        torch.testing.assert_close(got, F.scaled_dot_product_attention(*t, attn_mask=mask))


def test_groups_of_heads():
    q, k, v = tensors((2, 6, 5, 16), (2, 2, 30, 16), (2, 2, 30, 8))
    torch.testing.assert_close(
        sdpa(q, k, v, gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    )
    assert sdpa(q, k, v) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:1], v),
        lambda q, k, v: (q, k[:, :, 1:], v),
        lambda q, k, v: (q, k[..., 1:], v),
        lambda q, k, v: (q, k, v[:, :1]),
        lambda q, k, v: (q.double(), k, v),
        lambda q, k, v: (q.int(), k.int(), v.int()),
        lambda q, k, v: (q[0], k, v),
        lambda q, k, v: (q[None], k[None], v[None]),
        lambda q, k, v: (q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]),
        lambda q, k, v: (q[:, :0], k[:, :0], v[:, :0]),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (q[..., :0], k[..., :0], v),
        lambda q, k, v: (q, k, v[..., :0]),
        lambda q, k, v: (q, k, v, torch.ones(5, 29, dtype=torch.bool)),
        lambda q, k, v: (q, k, v, torch.ones(1, 2, 4, 5, 30, dtype=torch.bool)),
        lambda q, k, v: (q, k, v, torch.ones(5, 30, dtype=torch.int)),
        lambda q, k, v: (q, k, v, torch.ones(5, 30, dtype=torch.bool), True),
        lambda q, k, v: (q.to_sparse(), k, v),
    ],
)
def test_what_it_does_not_serve(change):
    assert sdpa(*change(*tensors((2, 4, 5, 16), (2, 4, 30, 16), (2, 4, 30, 16)))) is None


def test_no_rows():
    q, k, v = tensors((2, 4, 0, 16), (2, 4, 30, 16), (2, 4, 30, 8))
    assert sdpa(q, k, v).shape == (2, 4, 0, 8)
    assert sdpa(q[:0], k[:0], v[:0]).shape == (0, 4, 0, 8)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_opcheck(rank):
    t = [x[(0,) * (4 - rank)] for x in tensors((2, 4, 5, 16), (2, 4, 30, 16), (2, 4, 30, 8))]
    torch.library.opcheck(torch.ops.seqkern.sdpa.default, (*t, None, False, None, False))
