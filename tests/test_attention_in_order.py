"""Few queries that read keys and values in the order of addresses, and from several places by turns: which of the two
is the processor's, so both are forced here."""

import pytest
import torch

from seqkern.ops import _library
from seqkern.spec.attention import Tensors
from seqkern.testing import on_threads
from seqkern.testing_attention import LAYOUTS, OPTIONS, Case, check, laid_out, make_case, run

NATIVE = _library.native()
pytestmark = [pytest.mark.native, pytest.mark.built]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["by turns", "in order"], autouse=True)
def in_order(request):
    NATIVE.force_order(request.param)
    yield request.param
    NATIVE.force_order(None)


def check_several(dtype=torch.float32, **options):
    """Gradients of one or two queries are few numbers, of which some cancel."""
    check([make_case(dtype, B=1, **options, seed=seed) for seed in range(4)], slack=4)


# rows that are unrolled (64 and 128 in float32), those that are read to the end of a vector and copied, and too wide
# ones; one block of keys, several, parts of keys
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda x: str(x)[6:])
@pytest.mark.parametrize("S", [2, 100, 1100, 2500])
@pytest.mark.parametrize("size", [(64, 64), (128, 128), (20, 17), (32, 300), (3, 48)], ids=str)
@pytest.mark.parametrize("L", [1, 2])
def test_sizes(L, size, S, dtype):
    check_several(dtype, Hq=2, Hkv=2, L=L, S=S, D=size[0], Dv=size[1])


# in order: up to four of at most 64 numbers, two of 128 (of doubles half as many numbers), as far as a panel of queries
# is not the faster
@pytest.mark.parametrize("G", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("size", [(16, 16), (64, 64), (128, 128), (100, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=lambda x: str(x)[6:])
def test_heads_that_share_keys(dtype, size, G):
    check_several(dtype, Hq=2 * G, Hkv=2, L=1, S=300, D=size[0], Dv=size[1])


def test_the_two_ways_differ(in_order):
    """In the order of adding; else the tests here would try one of them twice."""
    q, k, v = (torch.randn(1, 8, n, 64) for n in (1, 2000, 2000))
    t = Tensors(q, k, v, *(None,) * 7)
    found = []
    for way in (in_order, not in_order):
        NATIVE.force_order(way)
        found.append(torch.ops.seqkern.attention(*t, 0.125, 0.0, 0.0, -1, -1, False, 0, 0, "")[0])
    assert torch.equal(*found) != (NATIVE.isa() in ("avx512", "avx512bf16"))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("D", "Dv", "S"), [(16, 0, 10), (0, 64, 10), (0, 0, 10), (128, 0, 10), (0, 64, 10000)]
)
@pytest.mark.parametrize("heads", [4, 16])
def test_heads_of_no_numbers(heads, D, Dv, S):
    """The functions refuse them; the op, which may be called by itself, must not crash."""
    t = Tensors(torch.randn(1, heads, 1, D), torch.randn(1, 4, S, D), torch.randn(1, 4, S, Dv), *(None,) * 7)
    output = torch.ops.seqkern.attention(*t, 1.0, 0.0, 0.0, -1, -1, False, 0, 0, "")[0]
    assert output.shape == (1, heads, 1, Dv)
    torch.testing.assert_close(
        output, t.value.mean(dim=2, keepdim=True).repeat_interleave(heads // 4, 1) if not D else output
    )


@pytest.mark.parametrize("L", [1, 2])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, L):
    check_several(Hq=2, Hkv=1, L=L, S=1300, D=64, **OPTIONS[options])


@pytest.mark.parametrize("how", LAYOUTS)
@pytest.mark.parametrize("D", [64, 20])
def test_strides(D, how):
    case = make_case(Hq=2, Hkv=2, L=1, S=137, D=D)
    t = Tensors(*(x if x is None or x.dim() < 4 else laid_out(x, how) for x in case.tensors))
    check(Case(t, case.options, case.grads))


@pytest.mark.parametrize("options", ["plain", "everything"])
def test_bits_do_not_depend_on_threads(options):
    case = make_case(B=2, Hq=4, Hkv=2, L=1, S=2300, D=64, **OPTIONS[options])
    first, *others = on_threads(lambda: run(case))
    for other in others:
        for name, x in first.items():
            assert torch.equal(x, other[name]), name


@pytest.mark.parametrize("D", [64, 20])
@pytest.mark.parametrize(
    ("options", "key"), [({"mask": "heads shared"}, 7), ({"window": (50, -1)}, 98)], ids=["mask", "window"]
)
def test_what_no_query_sees_does_not_leak(options, key, D):
    """A window of 50 begins with key 99, and the first vector of keys before it."""
    case = make_case(B=1, Hq=2, Hkv=2, L=1, S=150, D=D, causal="bottom-right", **options)
    mask = case.tensors.mask
    if mask is not None:
        mask[..., key] = False
    want = run(case)
    for x in case.tensors[1:3]:
        x[:, :, key] = torch.nan
    got = run(case)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_keys_from_memory():
    """Four queries of wide heads are read in order only where there are more bytes than caches hold."""
    q, k, v = (torch.randn(1, heads, n, 128) for heads, n in ((16, 1), (4, 9000), (4, 9000)))
    got = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    t = Tensors(q, k, v, *(None,) * 7)
    mine = torch.ops.seqkern.attention(*t, 128**-0.5, 0.0, 0.0, -1, -1, False, 0, 0, "")[0]
    torch.testing.assert_close(mine, got, rtol=1e-4, atol=1e-5)
