"""Attention in function transforms, under compilers and in exported programs."""

import pytest
import torch
from torch.func import grad, hessian, jacrev, jvp, vmap

from seqkern.functional import attention, scaled_dot_product_attention
from seqkern.testing_attention import OPTIONS, PACKED, keywords, make_case


def double(**options):
    case = make_case(torch.float64, Hq=2, Hkv=1, L=3, S=4, D=4, **options)
    return case.tensors[:3]


TRANSFORMED = {
    "plain": {},
    "capped, sunk": {"softcap": 2.0, "sinks": torch.ones(2, dtype=torch.float64), "window": 2},
}


@pytest.mark.parametrize("options", TRANSFORMED)
def test_transforms(options):
    q, k, v = double()
    run = lambda q: attention(q, k, v, **TRANSFORMED[options]).square().sum()  # noqa: E731
    leaf = q.clone().requires_grad_()
    (want,) = torch.autograd.grad(run(leaf), leaf)
    assert want.abs().min() > 0
    torch.testing.assert_close(grad(run)(q), want)
    torch.testing.assert_close(jacrev(run)(q), want)
    tangent = torch.randn_like(q)
    _, forward_mode = jvp(run, (q,), (tangent,))
    torch.testing.assert_close(forward_mode, (want * tangent).sum())
    each = vmap(grad(lambda q: attention(q[None], k[:1], v[:1], **TRANSFORMED[options]).square().sum()))(q)
    assert each.shape == q.shape and each.abs().min() > 0
    second = hessian(run)(q)
    torch.testing.assert_close(
        second, torch.autograd.functional.hessian(lambda q: spec_run(q, k, v, options), q)
    )
    assert second.any()


def spec_run(q, k, v, options):
    return attention(q, k, v, **TRANSFORMED[options], backend="reference").square().sum()


def test_vmap_of_torchs_door():
    q, k, v = make_case(Hkv=4).tensors[:3]
    want = torch.stack([scaled_dot_product_attention(*x) for x in zip(q, k, v)])
    torch.testing.assert_close(vmap(scaled_dot_product_attention)(q, k, v), want)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", ["plain", "everything", "causal", "mask, keys"])
@pytest.mark.parametrize("lengths", [(), PACKED], ids=["dense", "packed"])
def test_compile_without_a_graph_break(options, lengths):
    case = make_case(lengths=lengths, **OPTIONS[options])
    more = keywords(case)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    if lengths:
        more |= {"max_seqlen_q": 4, "max_seqlen_k": 5}
    found = []
    for run in (attention, compiled):
        leaves = [x.clone().requires_grad_() for x in case.tensors[:3]]
        output, lse = run(*leaves, **more, return_lse=True)
        found.append(
            (output, *torch.autograd.grad(output.square().sum() + lse.nan_to_num(neginf=0).sum(), leaves))
        )
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_torchs_door_and_any_length():
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for L in (3, 5, 9):
        q = torch.randn(2, 4, L, 8)
        torch.testing.assert_close(
            compiled(q, q, q, is_causal=True), scaled_dot_product_attention(q, q, q, is_causal=True)
        )


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_of_vmap_of_grad():
    q, k, v = double()
    f = vmap(grad(lambda q: attention(q[None], k[:1], v[:1], softcap=2.0).square().sum()))
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(q), f(q))


class Capped(torch.nn.Module):
    def forward(self, q, k, v, cu):
        return attention(
            q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=3, max_seqlen_k=3, softcap=2.0
        )


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_packed_input_trains_right(strict):
    q, k, v = (torch.randn(5, 2, 4) for _ in range(3))
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    program = torch.export.export(Capped(), (q, k, v, cu), strict=strict)
    found = []
    for run in (program.module(), Capped()):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        output = run(*leaves, cu)
        found.append((output, *torch.autograd.grad(output.square().sum(), leaves)))
    for got, want in zip(*found):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
