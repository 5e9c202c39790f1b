"""What the compiler makes of the attention kernels for GPUs that are not here, held against the committed table.

`python tests/test_attention_compile.py` writes the table anew; a change of it belongs into the commit that causes it.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton

from seqkern.kernels import attention, attention_backward, decode, launch, tuning_cache, weights
from seqkern.kernels.compilation import SHARED_LIMIT, resources
from seqkern.kernels.launch import Launch
from seqkern.ops.attention import empty_gradients, empty_outputs
from seqkern.testing_attention import make_case

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "attention_compiled.jsonl"
OPTIONS = {
    "causal": {"causal": "top-left"},
    "full": {},
    "everything": {
        "mask": "heads shared",
        "bias": "full",
        "causal": "bottom-right",
        "window": (60, -1),
        "softcap": 2.0,
        "alibi": 2,
        "sinks": True,
        "dropout_p": 0.2,
    },
    "shared bias": {"bias": "batch shared"},
}
TENSOR = {
    80: "HMMA",
    89: "HMMA",
    90: "HGMMA",
    100: "UTCHMMA",
}  # the others' blocks are too small for a warp group
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Compiled:
    """One kernel as one call would launch it."""

    kernel: str
    arch: int
    dtype: str
    size: int  # of a head
    options: str

    def __str__(self) -> str:
        return f"{self.kernel} sm_{self.arch} {self.dtype} {self.size} {self.options}"


def cases(archs, kernels, dtypes, sizes, options):
    return [
        Compiled(k, a, d, s, o)
        for a in archs
        for k in kernels
        for d in dtypes
        for s in sizes
        for o in options
    ]


SWEEP = ("forward", "keys", "queries")
ALL = (80, 90, 100)
DEFAULT = [
    *cases(ALL, SWEEP, ["bfloat16"], [64, 128], ["causal"]),
    *cases([90], ["decode", "bias"], ["bfloat16"], [128], ["shared bias"]),
    *cases([80], SWEEP, ["float32"], [64], ["causal"]),
]
SLOW = [
    *cases(ALL, SWEEP, ["bfloat16"], [256], ["causal"]),
    *cases(ALL, SWEEP, ["bfloat16"], [128], ["full", "everything"]),
    *cases(ALL, SWEEP, ["float32"], [128, 256], ["causal"]),
    *cases([89], SWEEP, ["bfloat16", "float32"], [128, 256], ["causal"]),
    *cases(ALL, ["decode"], ["bfloat16"], [64, 128, 256], ["full"]),
    *cases([89], ["decode"], ["bfloat16"], [256], ["full"]),
    *cases([90], ["weights", "delta", "combine"], ["bfloat16"], [128], ["full"]),
]


# Cases that may spill as many bytes as the table says; all others none.
SPILLING = {
    # With every option at once an H200 ran these blocks faster than the smaller ones that do not spill.
    *cases([90], ["keys", "queries"], ["bfloat16"], [128], ["everything"]),
    # Two words of each thread.
    *cases([90], ["forward"], ["bfloat16"], [128], ["everything"]),
    # Three and four words, kept before the loops and read after them: the assembler stops at the registers with which
    # one more program fits a multiprocessor. Smaller blocks would be too narrow for a mask (`LEAST_SUMMED`), or be
    # every other architecture's too.
    *cases([89], ["keys"], ["bfloat16"], [256], ["causal"]),
    *cases([100], ["queries"], ["float32"], [128], ["causal"]),
}


def launched(case: Compiled) -> Launch:
    few = case.kernel in ("decode", "combine")
    sizes = (
        {"B": 2, "Hq": 8, "Hkv": 1, "L": 1, "S": 4096}
        if few
        else {"B": 2, "Hq": 2, "Hkv": 1, "L": 256, "S": 256}
    )
    shares = "mean" if case.kernel == "weights" else ""
    call = make_case(DTYPES[case.dtype], **sizes, D=case.size, weights=shares, **OPTIONS[case.options])
    t, o = call.tensors, call.options
    output, lse, out = empty_outputs(t, o)
    if case.kernel == "forward":
        return attention.forward_launch(t, o, output, lse)
    if few:
        return decode.decode_launches(t, o, output, lse)[case.kernel == "combine"]
    if case.kernel == "weights":
        return weights.weights_launch(t, o, lse, out)
    needs = (case.kernel == "queries", case.kernel == "keys", t.bias is not None, False, False)
    gradients = empty_gradients(t, needs)
    launches, _ = attention_backward.backward_launches(
        t, o, call.grads[0], None, output, lse, gradients, needs
    )
    return next(each for each in launches if each.kernel.fn.__name__ == f"{case.kernel}_kernel")


def compiled(case: Compiled) -> dict:
    with (
        mock.patch.object(launch, "architecture", return_value=case.arch),
        mock.patch.object(tuning_cache, "measured", return_value={}),
    ):
        each = launched(case)
    found = resources(each, case.arch)
    blocks = {name.lower(): each.arguments.get(name, 0) for name in ("BLOCK_M", "BLOCK_N")}
    config = {**blocks, "num_warps": each.num_warps, "num_stages": each.num_stages}
    return {**asdict(case), **config, **found._asdict(), "triton": triton.__version__}


def table() -> dict[Compiled, dict]:
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return {Compiled(**{name: row[name] for name in Compiled.__dataclass_fields__}): row for row in rows}


@pytest.mark.parametrize(
    "case", [*DEFAULT, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)], ids=str
)
def test_budget(case):
    row, known = compiled(case), table()[case]
    assert row["spills"] <= (known["spills"] if case in SPILLING else 0), row
    assert row["shared"] <= SHARED_LIMIT[case.arch], row
    if case.dtype != "float32":  # which is multiplied exactly, without tensor instructions
        assert row["tensor"] in ({TENSOR[case.arch]} if case.kernel in SWEEP else {*TENSOR.values(), ""}), row
    if known["triton"] == row["triton"]:
        for name, slack in (("registers", 1.05), ("shared", 1.0), ("instructions", 1.05)):
            assert row[name] <= slack * known[name], f"{case}: {name} grew from {known[name]} to {row[name]}"


def test_table_is_of_these_cases():
    assert table().keys() == {*DEFAULT, *SLOW}
    assert {case for case, row in table().items() if row["spills"]} == SPILLING


if __name__ == "__main__":
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w") as file:
        for case in [*DEFAULT, *SLOW]:
            row = compiled(case)
            file.write(json.dumps(row) + "\n")
            print(
                case,
                row["registers"],
                row["spills"],
                row["shared"],
                row["tensor"],
                file=sys.stderr,
                flush=True,
            )
