"""The choice of blocks is a pure function that has an answer for every call."""

import itertools

import pytest
import torch

from seqkern.kernels import tuning_attention as tuning
from seqkern.kernels.launch import precision

ARCHS = (80, 86, 89, 90, 100, 103, 120)


@pytest.mark.parametrize("config", [tuning.forward_config, tuning.keys_config, tuning.queries_config])
def test_every_call_has_blocks(config):
    for arch, width, size, extras in itertools.product(ARCHS, (2, 4), (16, 32, 64, 128, 256), range(4)):
        found = config(tuning.Shape(arch, width, size, extras))
        for n in found[:3]:
            assert n >= 4 and n & (n - 1) == 0, (arch, width, size, extras)
        assert found.block_m >= 16 and found.block_n >= 16  # the least of a tensor product


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_decode_holds_all_rows(rows):
    for width, size in itertools.product((2, 4), (16, 64, 128, 256)):
        assert tuning.decode_config(tuning.Shape(90, width, size, 0), rows).block_m >= rows


@pytest.mark.parametrize("S", [513, 4096, 16384, 16385, 10**6])
def test_splits(S):
    size = tuning.split_size(S)
    assert size >= tuning.SPLIT and size & (size - 1) == 0 and -(-S // size) <= 64


def test_float32_is_exact_unless_torch_was_told_otherwise():
    before = torch.get_float32_matmul_precision()
    try:
        for name, want in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(name)
            assert precision(torch.float32) == want and precision(torch.float16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
