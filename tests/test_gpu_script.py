"""benchmarks/gpu.sh with a Python that only notes what it is asked, and the parts of it that are Python."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqkern import tune

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, PARTS = ROOT / "benchmarks" / "gpu.sh", ROOT / "benchmarks" / "gpu.py"
# Notes its arguments; ends as the first line of `answers` says whose beginning is in them, and strikes that line out.
FAKE = """#!/usr/bin/env bash
echo "$*" >> {folder}/asked
while read -r code words; do
  if [[ "$*" == *"$words"* ]]; then
    grep -vxF "$code $words" {folder}/answers > {folder}/rest; mv {folder}/rest {folder}/answers
    exit "$code"
  fi
done < {folder}/answers
exit 0
"""


@pytest.fixture
def gpu(tmp_path):
    """Runs the script; gives its exit code, its output and what its Python was asked."""
    fake = tmp_path / "python"
    fake.write_text(FAKE.format(folder=tmp_path))
    fake.chmod(0o755)

    def run(*words, answers=(), **environment):
        (tmp_path / "answers").write_text("".join(f"{line}\n" for line in answers))
        (tmp_path / "asked").write_text("")
        env = os.environ | {"PYTHON": str(fake)} | environment
        done = subprocess.run(
            [str(SCRIPT), "-o", str(tmp_path / "out"), *words],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        asked = (tmp_path / "asked").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, asked

    return run


def test_three_stages_unless_told(gpu, tmp_path):
    code, output, asked = gpu()
    assert code == 0 and asked[1] == "benchmarks/gpu.py check"
    tests, *rest = [line for line in asked if not line.startswith("-c") and "check" not in line]
    assert "-m pytest -q -m gpu and not slow" in tests and "tests/test_triton_graph.py" in tests
    assert "tests/test_cli.py" not in tests
    out = tmp_path / "out"
    assert [line.rstrip() for line in rest] == [
        f"benchmarks/gpu.py bench rnn-cuda {out}",
        f"benchmarks/gpu.py bench attention-cuda {out}",
        f"benchmarks/gpu.py summary {out}",
    ]
    for stage in ("tests", "rnn", "attention"):
        assert f"{stage}: passed" in output and f"{stage}: passed" in (out / "gpu.log").read_text()


def test_stages_and_rows_by_name(gpu, tmp_path):
    code, output, asked = gpu("-f", "bf16 LSTM", "tune", "rnn")
    assert code == 0 and "tests" not in output
    assert asked[2] == f"benchmarks/gpu.py tune {tmp_path / 'out'}"
    assert asked[3] == f"benchmarks/gpu.py bench rnn-cuda {tmp_path / 'out'} bf16 LSTM"


def test_what_runs_unless_told_takes_ten_minutes_at_most():
    limits = dict(re.findall(r"\[(\w+)\]=(\d+)", SCRIPT.read_text()))
    assert sum(int(limits[stage]) for stage in ("tests", "rnn", "attention")) <= 600
    assert all(int(limit) <= 600 for limit in limits.values())


def test_what_is_tuned(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(PARTS.parent))
    asked = []
    monkeypatch.setattr(tune, "tune", lambda works, path, say: asked.extend([path, *works]))
    assert importlib.import_module("gpu").tuned(str(tmp_path)) == 0
    path, *works = asked
    assert path == tmp_path / "tuning.json"
    for D in (64, 128):
        assert {tune.Attention("bfloat16", D), tune.Decode("bfloat16", D, G=8)} <= set(works)
    assert {work.cell for work in works if isinstance(work, tune.Recurrent)} == {"lstm"}


def test_a_stage_that_fails_stops_no_other(gpu):
    code, output, asked = gpu(answers=["1 pytest", "124 rnn-cuda"])
    assert code == 1
    assert (
        "tests: failed, exit code" in output
        and "rnn: out of time" in output
        and "attention: passed" in output
    )
    assert "summary" in asked[-1]


@pytest.mark.parametrize(("times", "tried", "code"), [(2, 3, 0), (4, 4, 1)])
def test_a_lost_device_is_tried_in_another_process(gpu, times, tried, code):
    each_once = ["3 rnn-cuda", "3 py bench", "3 bench rnn", "3 gpu.py bench"]
    found, output, asked = gpu("rnn", answers=each_once[:times])
    assert found == code and ("rnn: failed, exit code 3" in output) == bool(code)
    assert sum("rnn-cuda" in line for line in asked) == tried


def test_without_a_gpu_nothing_is_run(gpu):
    code, _, asked = gpu(answers=["2 check"])
    assert code == 2 and "check" in asked[-1]


@pytest.mark.parametrize("words", [("paint",), ("-x",), ("-o",)])
def test_mistakes_are_told_before_anything_runs(gpu, words):
    code, output, asked = gpu(*words)
    assert code == 2 and "gpu.sh [-o FOLDER] [-f TEXT] [STAGE ...]" in output and not asked


def test_sources_are_linked_where_they_are_not_installed(gpu):
    code, _, _ = gpu("tune", answers=["1 import seqkern.kernels"])
    links = ROOT / "build" / "links"
    assert code == 0 and (links / "seqkern" / "kernels" / "scan.py").samefile(ROOT / "kernels" / "scan.py")
    done = subprocess.run(
        [sys.executable, "-S", "-c", "import importlib.util as u; print(u.find_spec('seqkern').origin)"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(links)},
        check=True,
    )
    assert str(links) in done.stdout


def parts(*words):
    return subprocess.run(
        [sys.executable, str(PARTS), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )


def test_the_parts_tell_that_there_is_no_gpu(tmp_path):
    done = parts("check")
    assert done.returncode == 2 and "nothing was run" in done.stderr
    assert parts("summary", str(tmp_path)).returncode == 0
    assert parts("paint").returncode == 1
