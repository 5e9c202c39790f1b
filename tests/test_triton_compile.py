"""Ahead-of-time compilation of the recurrent Triton kernels, held to the table in benchmarks/results."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import triton

from seqkern.kernels import layer, tuning

sys.path.append(
    str(Path(__file__).resolve().parents[1] / "benchmarks")
)  # its worker processes find it there too
compiled = importlib.import_module("compiled")

TABLE = [json.loads(line) for line in compiled.RESULTS.read_text().splitlines()]
KNOWN = {(row["case"], row["kernel"], row["arch"]): row for row in TABLE[1:]}
CASES = {case.name: case for case in compiled.CASES}
# One for each kernel, matmul and way of choosing a tile; `make test-full` compiles all of them.
USUAL = [
    "lstm-bfloat16-H128-B16-sequence",
    "lstm-bfloat16-H100-B16-sequence",
    "lstm-float16-H64-B16-sequence-proj32",
    "gru-bfloat16-H33-B16-sequence-packed",
    "lstm-float32-H32-B16-sequence",
    "lstm-bfloat16-H1024-B64-steps",
    "gru-float32-H512-B64-steps",
    "gru-float32-H256-B16-cell",
]
REST = [name for name in CASES if name not in USUAL]


def check(names):
    jobs = [(arch, CASES[name]) for name in names for arch in compiled.ARCHS]
    rows = compiled.measure_all(jobs)
    assert len(rows) == 2 * len(jobs)
    bad = []
    for row in rows:
        known = KNOWN[row["case"], row["kernel"], row["arch"]]
        worse = [
            f"{name} {row[name]} > {known[name]}"
            for name, slack in (
                ("registers", 8),
                ("shared", 0),
                ("local", 0),
                ("instructions", known["instructions"] // 10),
            )
            if row[name] > known[name] + slack
        ]
        worse += [
            f"no {name} any more"
            for name in ("HGMMA", "UTCHMMA", "HMMA")
            if name in known and name not in row
        ]
        if worse:
            bad.append(f"sm_{row['arch']} {row['kernel']} {row['case']}: {', '.join(worse)}")
    assert not bad, "worse than benchmarks/results/compiled-rnn.jsonl:\n  " + "\n  ".join(bad)


def test_compiled_as_the_table_says():
    check(USUAL)


@pytest.mark.slow
def test_all_compiled_as_the_table_says():
    check(REST)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_persistent(cell, monkeypatch):
    """What the persistent kernels keep on chip through all steps fits there: their weights and what passes by."""

    def persistent(self, kernel):
        return tuning.persistent_config(90, 132, self.problem(kernel))

    monkeypatch.setattr(layer.Layer, "persistent", persistent)
    case = compiled.Case(cell, "bfloat16", 768, 16)
    made = compiled.launches(90, case)
    assert [each[0].__name__ for each in made] == ["persistent_backward", "persistent_forward"]
    for kernel, _, arguments, constants, config in made:
        found = compiled.figures(compiled.compiled(kernel, arguments, constants, config, 90))
        # Of the GRU's backward some numbers that are the same in all steps do not fit, and are read in each.
        spilled = 48 if (cell, kernel.__name__) == ("gru", "persistent_backward") else 0
        assert found["local"] <= spilled and found["registers"] <= tuning.REGISTERS, (kernel, found)
        assert found.get("HGMMA", 0) >= constants["CHUNKS"] and "HMMA" not in found, (kernel, found)
        bound = tuning.persistent_bytes(compiled.problem(case, kernel.__name__), config)
        assert found["shared"] <= bound <= tuning.ARCHS[90].shared, (kernel, found)


def test_table_is_of_this_triton_and_whole():
    assert TABLE[0]["triton"] == triton.__version__
    assert len(KNOWN) == 2 * len(compiled.ARCHS) * len(CASES) == len(TABLE) - 1


@pytest.mark.parametrize("row", TABLE[1:], ids=lambda r: f"{r['arch']}-{r['kernel']}-{r['case']}")
def test_table_keeps_the_promises(row):
    case, config = CASES[row["case"]], tuning.Config(*row["config"])
    assert row["local"] == 0 and row["registers"] <= tuning.REGISTERS
    assert row["shared"] <= tuning.ARCHS[row["arch"]].shared
    units, columns = config.BLOCK_H, config.BLOCK_B
    tensor = {name for name in ("HGMMA", "UTCHMMA", "HMMA") if name in row}
    if case.dtype == "float32":
        assert not tensor, "float32 is not to be rounded unless TF32 is allowed"
        return
    # wgmma and tcgen05 take 64 rows of weights and 16 sequences; with less there is HMMA.
    wide = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[row["arch"]]
    assert (wide if units >= 64 and columns >= 16 else "HMMA") in tensor


@pytest.mark.parametrize("arch", compiled.ARCHS)
@pytest.mark.parametrize("case", [c for c in compiled.CASES if c.path == "sequence"], ids=lambda c: c.name)
def test_shared_memory_is_computed_not_guessed(case, arch):
    """The bound by which a sequence is found to fit holds what the compiler then takes."""
    for kernel, _, _, _, config in compiled.launches(arch, case):
        row = KNOWN[case.name, kernel.__name__, arch]
        assert row["config"] == list(config), (
            "the table is older than the rules: python benchmarks/compiled.py"
        )
        p = compiled.problem(case, kernel.__name__)
        assert row["shared"] <= tuning.shared_bytes(p, config) <= tuning.ARCHS[arch].shared
