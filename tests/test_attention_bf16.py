"""Attention in bfloat16, whose products are dots of pairs on machines that have them: what goes by twos there and
not in float32, on every instruction set that this machine runs."""

import pytest
import torch
import torch.nn.functional as F

from seqkern.functional import scaled_dot_product_attention
from seqkern.ops import _library
from seqkern.ops.attention import NEEDS
from seqkern.spec.attention import Tensors
from seqkern.testing import on_threads, relative_rms
from seqkern.testing_attention import BANDS, LAYOUTS, OPTIONS, Case, check, laid_out, make_case

NATIVE = _library.native()
pytestmark = [pytest.mark.native, pytest.mark.built]
BF16 = torch.bfloat16
# odd numbers of keys, of queries and of what a head holds, in one block and in several
ODD = {
    "one key": {"L": 40, "S": 1, "D": 8},
    "a block and a key": {"L": 33, "S": 129, "D": 16},
    "chunks and a key": {"Hq": 2, "Hkv": 1, "L": 131, "S": 513, "D": 64},
    "heads of odd sizes": {"L": 37, "S": 70, "D": 33, "Dv": 7},
    "one number": {"L": 40, "S": 35, "D": 1, "Dv": 1},
    "wide heads": {"B": 1, "Hq": 1, "Hkv": 1, "L": 40, "S": 75, "D": 513, "Dv": 300},
    "side by side": {"Hq": 12, "Hkv": 2, "L": 3, "S": 71, "D": 20},
    "half a vector": {"Hq": 2, "Hkv": 2, "L": 5, "S": 131, "D": 130, "Dv": 130},
    "split": {"B": 1, "Hq": 1, "Hkv": 1, "L": 20, "S": 2101, "D": 20},
}


def several(**options) -> list[Case]:
    return [make_case(BF16, **options, seed=seed) for seed in range(4)]


@pytest.mark.parametrize("options", ["plain", "everything", "causal", "window", "dropout", "mask and bias"])
@pytest.mark.parametrize("sizes", ODD)
def test_odd_sizes(isa, sizes, options):
    check(several(**ODD[sizes], **OPTIONS[options]))


@pytest.mark.parametrize("size", [(130, 131), (71, 340), (340, 71)], ids=str)
@pytest.mark.parametrize("band", BANDS)
def test_bands_that_end_with_the_first_of_a_pair(isa, band, size):
    L, S = size
    check(make_case(BF16, B=1, Hq=2, Hkv=1, L=L, S=S, D=16, **BANDS[band]))


@pytest.mark.parametrize("D", [16, 17])
@pytest.mark.parametrize("how", LAYOUTS)
def test_strides(isa, how, D):
    case = make_case(BF16, Hq=2, Hkv=2, L=40, S=37, D=D, mask="full", bias="full", sinks=True)
    t = Tensors(*(x if x is None or x.dim() < 4 else laid_out(x, how) for x in case.tensors))
    check(Case(t, case.options, (laid_out(case.grads[0], how), case.grads[1])))


@pytest.mark.parametrize("which", range(1, 3), ids=["key", "value"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_future_key_beside_the_last_one_does_not_leak(isa, value, which):
    """The keys of the first panels end with the first of a pair, whose second a later panel sees."""
    q, k, v = (torch.randn(1, 1, n, 16, dtype=BF16) for n in (96, 97, 97))

    def both(q, k, v):
        output, lse, _ = torch.ops.seqkern.attention(*arguments(q, k, v))
        grads = (torch.ones_like(output), None, None)
        return output, torch.ops.seqkern.attention_backward(
            *grads, output, lse, *arguments(q, k, v), *((True,) * len(NEEDS))
        )[0]

    def arguments(*tensors):
        return *tensors, *(None,) * 7, 0.25, 0.0, 0.0, -1, 0, True, 0, 0, ""

    want = both(q, k, v)
    (k if which == 1 else v)[:, :, 65] = value
    for threads in on_threads(lambda: both(q, k, v)):
        for got, expected in zip(threads, want):
            assert torch.equal(got[:, :, :64], expected[:, :, :64])


@pytest.mark.parametrize("scale", [-0.125, 1e-3, 8.0])
@pytest.mark.parametrize("options", ["plain", "softcap", "causal"])
def test_any_scale(isa, scale, options):
    """Where q meets the keys as it is, the scale comes behind the product."""
    cases = several(L=70, S=90, D=32, **OPTIONS[options])
    check([Case(each.tensors, each.options._replace(scale=scale), each.grads) for each in cases])


@pytest.mark.parametrize("causal", [False, True])
def test_it_errs_no_more_than_torch(isa, causal):
    q, k, v, g = (torch.randn(2, 4, 300, 64, dtype=BF16) for _ in range(4))

    def results(function, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        output = function(*inputs, is_causal=causal)
        return output, *torch.autograd.grad(output, inputs, g.to(dtype))

    exact = results(F.scaled_dot_product_attention, torch.float64)
    ours, theirs = results(scaled_dot_product_attention, BF16), results(F.scaled_dot_product_attention, BF16)
    for got, other, want in zip(ours, theirs, exact):
        assert relative_rms(got, want) < 1.1 * relative_rms(other, want)
