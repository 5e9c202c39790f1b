"""The choice of blocks: rules that have an answer for every call, and what was measured before them."""

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch

from seqkern.kernels import launch, tuning_cache
from seqkern.kernels import tuning_attention as tuning
from seqkern.kernels.launch import precision
from seqkern.kernels.tuning import limits
from seqkern.kernels.tuning_attention import Config, Shape
from seqkern.testing_attention import make_case

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "attention_compiled.jsonl"

ARCHS = (80, 86, 89, 90, 100, 103, 120)


@pytest.mark.parametrize("config", [tuning.forward_config, tuning.keys_config, tuning.queries_config])
def test_every_call_has_blocks(config):
    for arch, width, size, extras in itertools.product(ARCHS, (2, 4), (16, 32, 64, 128, 256), range(4)):
        found = config(Shape(arch, width, size, extras))
        for n in found[:3]:
            assert n >= 4 and n & (n - 1) == 0, (arch, width, size, extras)
        assert found.block_m >= 16 and found.block_n >= 16  # the least of a tensor product


def test_blocks_of_weights_fit_beside_each_other():
    """Queries and keys, both whole: 128 of 99 KiB in blocks of 64 for float32 heads of 256 on the smaller GPUs."""
    for arch, width, size in itertools.product(ARCHS, (2, 4), (64, 128, 256)):
        rows = 2 * tuning.weights_block(Shape(arch, width, size, 0))
        assert rows * size * width <= limits(arch).shared, (arch, width, size)
    assert (
        tuning.weights_block(Shape(89, 4, 256, 0)) == 32 and tuning.weights_block(Shape(90, 4, 256, 0)) == 64
    )


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_decode_holds_all_rows(rows):
    for width, size in itertools.product((2, 4), (16, 64, 128, 256)):
        assert tuning.decode_config(Shape(90, width, size, 0, rows)).block_m >= rows


# As compiled, each on the smallest architecture that it must fit: three stages took 138, 168 and 112 KiB.
@pytest.mark.parametrize(
    ("shape", "stages"),
    [(Shape(89, 2, 256, 0), 2), (Shape(80, 2, 256, 0, rows=64), 2), (Shape(89, 2, 128, 3, rows=64), 2)],
)
def test_decode_has_fewer_stages_where_three_do_not_fit(shape, stages):
    assert tuning.decode_config(shape).num_stages == stages
    assert tuning.decode_config(shape._replace(arch=90)).num_stages == 3


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


def test_what_torch_was_told_last_about_tf32_holds():
    """By torch's later way, after which the earlier one raises when it is asked."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for name, want in (("tf32", "tf32"), ("ieee", "ieee")):
            matmul.fp32_precision = name
            assert precision(torch.float32) == want and precision(torch.bfloat16) == "ieee"
            for arch, size in itertools.product(ARCHS, (64, 256)):
                with mock.patch.object(launch, "architecture", return_value=arch):
                    call = launch.prepare(*_of(make_case(D=size)))
                small = arch in tuning.SMALL and size > 128  # their operands would take 128 of 99 KiB
                assert call.constants["PRECISION"] == ("ieee" if small else want)
                assert call.shape.tf32 == (call.constants["PRECISION"] == "tf32")
    finally:
        matmul.fp32_precision = before


def _of(case):
    return case.tensors, case.options


EVERY = [
    Shape(*each)
    for each in itertools.product(ARCHS, (2, 4), (16, 64, 128, 256), (0, 3), (1, 64), (False, True))
]


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_the_key_is_what_the_rule_looks_at(kernel):
    rules = {}
    for shape in EVERY:
        found = rules.setdefault((shape.arch, tuning.key(kernel, shape)), tuning.KERNELS[kernel].rule(shape))
        assert found == tuning.KERNELS[kernel].rule(shape)


def test_keys_by_name():
    assert tuning.key("forward", Shape(90, 2, 16, 0, 5)) == "attention_forward|16-bit|D64|plain"
    assert tuning.key("keys", Shape(90, 4, 128, 2, tf32=True)) == "attention_keys|32-bit-tf32|D128|extras"
    assert tuning.key("decode", Shape(80, 4, 256, 0, 17)) == "attention_decode|32-bit|D256|plain|M32"


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"L": 70, "S": 90, "D": 20, "Dv": 100}, "attention_forward|16-bit|D128|plain"),
        ({"B": 5, "L": 9, "S": 2000, "D": 128, "causal": "top-left"}, "attention_forward|16-bit|D128|plain"),
        ({"lengths": ((3, 7), (50, 60)), "D": 128, "softcap": 1.0, "alibi": 1}, "attention_forward|16-bit|D128|plain"),
        ({"D": 64, "mask": "keys"}, "attention_forward|16-bit|D64|extra"),
        ({"D": 64, "dropout_p": 0.5}, "attention_forward|16-bit|D64|extra"),
        ({"D": 64, "mask": "keys", "bias": "full"}, "attention_forward|16-bit|D64|extras"),
        ({"D": 64, "mask": "keys", "bias": "full", "dropout_p": 0.5}, "attention_forward|16-bit|D64|extras"),
    ],
)  # fmt: skip
def test_a_call_has_the_key_of_its_kind(sizes, key):
    case = make_case(torch.float16, **sizes)
    assert tuning.key("forward", launch.prepare(case.tensors, case.options).shape) == key


def test_decode_counts_the_queries_of_a_group():
    case = make_case(torch.float16, Hq=8, Hkv=1, L=3, S=600, D=64)
    shape = launch.prepare(case.tensors, case.options).shape
    assert tuning.key("decode", shape) == "attention_decode|16-bit|D64|plain|M32"


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_are_few_and_begin_with_the_rule(kernel):
    for shape in EVERY:
        rule, *others = found = tuning.candidates(kernel, shape)
        assert rule == tuning.KERNELS[kernel].rule(shape)
        assert len(set(found)) == len(found) and 2 <= len(found) <= 25, shape
        for c in found:
            assert tuning.usable(kernel, shape, c), (shape, c)
        for c in others:
            assert (
                c.block_n in tuning.BLOCKS and c.num_warps in tuning.WARPS and c.num_stages in tuning.STAGES
            )
            assert c.block_m == rule.block_m or (kernel != "decode" and c.block_m in tuning.BLOCKS)


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_shared_memory_is_a_lower_bound(kernel):
    """Nothing that runs is taken for what does not fit."""
    rows = [row for line in TABLE.read_text().splitlines() if (row := json.loads(line))["kernel"] == kernel]
    assert rows
    for row in rows:
        shape = Shape(row["arch"], 4 if row["dtype"] == "float32" else 2, row["size"], 0)
        config = Config(*(row[name] for name in Config._fields))
        bound = tuning.shared_bytes(kernel, shape, config)
        assert bound <= row["shared"], row
        if row["num_stages"] > 1:  # with one, what passes may go through shared memory that is not counted
            assert row["shared"] / 2 <= bound, row


SUMMING = [kernel for kernel in tuning.KERNELS if kernel != "bias"]  # whose products sum over keys or queries


def summed(kernel, config):
    """What a product of weights sums over at a time."""
    return config.block_m if kernel == "keys" else config.block_n


@pytest.mark.parametrize("kernel", SUMMING)
def test_rules_sum_over_enough_for_tensor_cores(kernel):
    """With a mask of bytes 16 would give a wrong product; of TF32 the rules take no 16 at all."""
    for arch, size, extras, rows in itertools.product(ARCHS, (16, 32, 64, 128, 256), range(4), (1, 64)):
        tf32 = Shape(arch, 4, size, extras, rows, tf32=True)
        assert summed(kernel, tuning.KERNELS[kernel].rule(tf32)) >= tuning.LEAST_SUMMED, tf32
        if extras:
            half = Shape(arch, 2, size, extras, rows)
            assert summed(kernel, tuning.KERNELS[kernel].rule(half)) >= tuning.LEAST_SUMMED, half


def test_tables_sum_over_enough_for_tensor_cores():
    tables = {"forward": tuning.FORWARD, "keys": tuning.KEYS, "queries": tuning.QUERIES}
    for kernel, table in tables.items():
        rows = [row for (_, extras), row in table.items() if extras] + [tuning.TF32[kernel]]
        for size, config in ((size, config) for row in rows for size, config in row.items()):
            assert summed(kernel, config) >= tuning.LEAST_SUMMED, (kernel, size, config)


def narrow(kernel):
    """A configuration that sums over 16."""
    return Config(16, 64, 4, 1) if kernel == "keys" else Config(64, 16, 4, 1)


@pytest.mark.parametrize("kernel", SUMMING)
@pytest.mark.parametrize("extras", [1, 2, 3])
def test_16_is_summed_over_where_it_is_right(nothing_measured, kernel, extras):
    config = narrow(kernel)
    for arch in ARCHS:
        for wrong in (Shape(arch, 2, 64, extras), Shape(arch, 4, 64, extras, tf32=True)):
            assert not tuning.usable(kernel, wrong, config)
            nothing_measured[tuning.key(kernel, wrong)] = config
            assert tuning.choose(kernel, wrong) == tuning.KERNELS[kernel].rule(wrong) != config
        for right in (Shape(arch, 4, 64, extras), Shape(arch, 2, 64, 0), Shape(arch, 4, 64, 0, tf32=True)):
            assert tuning.usable(kernel, right, config)
            nothing_measured[tuning.key(kernel, right)] = config
            assert tuning.choose(kernel, right) == config
    assert all(summed(kernel, c) > 16 for c in tuning.candidates(kernel, Shape(90, 2, 64, extras)))


@pytest.fixture
def nothing_measured(monkeypatch):
    kept = {}
    monkeypatch.setattr(tuning_cache, "measured", lambda: kept)
    return kept


def test_forced_comes_before_measured_before_the_rule(nothing_measured):
    shape = Shape(90, 2, 128, 0)
    key = tuning.key("queries", shape)
    assert tuning.choose("queries", shape) == tuning.queries_config(shape)
    nothing_measured[key] = (32, 32, 4, 2)
    assert tuning.choose("queries", shape) == Config(32, 32, 4, 2)
    assert tuning.choose("queries", shape._replace(rows=7)) == Config(32, 32, 4, 2)
    for other in (shape._replace(size=64), shape._replace(bytes=4), shape._replace(extras=1)):
        assert tuning.choose("queries", other) == tuning.queries_config(other)
    assert tuning.choose("keys", shape) == tuning.keys_config(shape)
    with tuning_cache.forced({key: Config(64, 16, 4, 1)}):
        assert tuning.choose("queries", shape) == Config(64, 16, 4, 1)
    assert tuning.choose("queries", shape) == Config(32, 32, 4, 2)


@pytest.mark.parametrize(
    ("kernel", "shape", "wrong"),
    [
        ("forward", Shape(90, 2, 128, 0), (128, 128, 8, 8)),  # 480 KiB of shared memory
        ("forward", Shape(86, 2, 256, 0), (128, 128, 8, 2)),  # 192 KiB of 99
        ("keys", Shape(90, 2, 128, 0), (8, 64, 4, 1)),  # less than a tensor product takes
        ("decode", Shape(90, 2, 64, 0, rows=17), (16, 64, 4, 1)),  # would drop a row
        ("decode", Shape(90, 2, 64, 0), (16, 512, 4, 1)),  # would read into the next split
    ],
)
def test_what_cannot_serve_is_not_used(nothing_measured, kernel, shape, wrong):
    nothing_measured[tuning.key(kernel, shape)] = wrong
    assert tuning.choose(kernel, shape) == tuning.KERNELS[kernel].rule(shape)
