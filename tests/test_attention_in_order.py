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


@pytest.mark.parametrize("G", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("D", [16, 64, 128])
def test_heads_that_share_keys(D, G):
    check_several(Hq=2 * G, Hkv=2, L=1, S=300, D=D)


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
@pytest.mark.parametrize("options", [{"mask": "heads shared"}, {"window": (50, -1)}], ids=["mask", "window"])
def test_what_no_query_sees_does_not_leak(options, D):
    case = make_case(B=1, Hq=2, Hkv=2, L=1, S=150, D=D, causal="bottom-right", **options)
    mask = case.tensors.mask
    if mask is not None:
        mask[..., 7] = False
    want = run(case)
    for x in case.tensors[1:3]:
        x[:, :, 7] = torch.nan
    got = run(case)
    assert all(torch.equal(got[name], x) for name, x in want.items())


def test_keys_from_memory():
    """Four queries of wide heads are read in order only where there are more bytes than caches hold."""
    q, k, v = (torch.randn(1, heads, n, 128) for heads, n in ((16, 1), (4, 9000), (4, 9000)))
    got = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    t = Tensors(q, k, v, *(None,) * 7)
    mine = torch.ops.seqkern.attention(*t, 128**-0.5, 0.0, 0.0, -1, -1, False, 0, 0, "")[0]
    torch.testing.assert_close(mine, got, rtol=1e-4, atol=1e-5)
