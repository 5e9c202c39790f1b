"""The command line, and a small run of the demo."""

import re

import pytest
from typer.testing import CliRunner

import seqkern
from seqkern.cli import app
from seqkern.ops import _library


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_info_names_version_and_kernels():
    text = run("info").output
    assert seqkern.__version__ in text
    assert ("missing" in text) == (_library.native() is None)
    assert "Triton" in text and "GPU" in text


def test_verify_passes():
    done = run("verify")
    assert done.exit_code == 0, done.output
    assert done.output.count(" ok ") == 10


def test_demo_shows_both_runs_and_draws(tmp_path):
    done = run("demo", "--cell", "gru", "--steps", "3", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert re.search(r"3 steps of training", done.output)
    assert "held-out loss, seqkern" in done.output  # in one piece: the table fits 80 columns
    assert (tmp_path / "loss.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "says"), [(("--cell", "elman"), "expected one of"), (("--steps", "0"), "at least 1")]
)
def test_demo_refuses(words, says, tmp_path):
    done = run("demo", *words, "--output", str(tmp_path))
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "loss.png").exists()
