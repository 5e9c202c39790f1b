"""torch's plug-in door for flash attention: registered on import, activated by the user alone, and undone."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from seqkern.integrations import torch_sdpa
from seqkern.testing_attention import make_case

FORWARD = "aten::_scaled_dot_product_flash_attention"


def test_importing_registers_and_no_more():
    code = (
        "import torch, seqkern, torch.nn.attention as a\n"
        "assert 'seqkern' not in a.list_flash_attention_impls()\n"
        "import seqkern.integrations.torch_sdpa\n"
        "assert 'seqkern' in a.list_flash_attention_impls()\n"
        "assert a.current_flash_attention_impl() is None\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_activated_and_restored():
    before = torch._C._dispatch_dump(FORWARD)
    activate_flash_attention_impl("seqkern")
    try:
        assert "seqkern" in list_flash_attention_impls() and current_flash_attention_impl() == "seqkern"
        assert torch._C._dispatch_dump(FORWARD) != before
    finally:
        restore_flash_attention_impl()
    assert current_flash_attention_impl() is None
    assert torch._C._dispatch_dump(FORWARD) == before


@pytest.mark.parametrize("is_causal", [False, True])
def test_takes_and_returns_what_aten_does(is_causal):
    case = make_case(Hkv=4, L=6, S=6)
    q, k, v = (x.requires_grad_() for x in case.tensors[:3])
    want = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    output, lse, _, _, max_q, max_k, seed, offset, _ = torch_sdpa.forward(q, k, v, 0.0, is_causal)
    torch.testing.assert_close(output, want)
    assert (max_q, max_k) == (6, 6) and lse.shape == (2, 4, 6) and output.stride() == q.stride()
    got = torch_sdpa.backward(
        case.grads[0], q, k, v, output, lse, None, None, 6, 6, 0.0, is_causal, seed, offset
    )
    for a, b in zip(got, torch.autograd.grad(want, (q, k, v), case.grads[0])):
        torch.testing.assert_close(a, b)


def test_looks_as_torchs_compiler_expects_it():
    """It asserts the sizes and strides of what the operator's meta kernel gives."""
    case = make_case(Hkv=4, L=6, S=6)
    given = [x.to("meta") for x in case.tensors[:3]]
    wanted = torch.ops.aten._scaled_dot_product_flash_attention.default(*given)
    for got, want in zip(torch_sdpa.forward(*case.tensors[:3]), wanted, strict=True):
        if isinstance(want, torch.Tensor):
            assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())
        else:
            assert got == want


def test_backward_drops_what_forward_dropped():
    q, k, v = make_case(Hkv=4).tensors[:3]
    output, lse, *_, seed, offset, _ = torch_sdpa.forward(q, k, v, 0.5)
    # the gradient of values is linear in the kept weights: <dv, v> is <g, output>
    g = torch.randn_like(output)
    *_, dv = torch_sdpa.backward(g, q, k, v, output, lse, None, None, 5, 7, 0.5, False, seed, offset)
    torch.testing.assert_close((dv * v).sum(), (g * output).sum())


def test_no_debug_mask():
    q, k, v = make_case(Hkv=4).tensors[:3]
    with pytest.raises(RuntimeError, match="return_debug_mask=False"):
        torch_sdpa.forward(q, k, v, 0.0, False, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_the_device(dtype):
    q, k, v = (x.cuda().requires_grad_() for x in make_case(dtype, Hkv=4, L=70, S=70, D=64).tensors[:3])
    g = torch.randn_like(q)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        grads = torch.autograd.grad(want, (q, k, v), g)
        activate_flash_attention_impl("seqkern")
        try:
            got = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            found = torch.autograd.grad(got, (q, k, v), g)
        finally:
            restore_flash_attention_impl()
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
    for a, b in zip(found, grads):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
