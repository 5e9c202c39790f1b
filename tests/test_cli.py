"""The command line, and a small run of the demo."""

import io
import re

import pytest
from rich.console import Console
from typer.testing import CliRunner

import seqkern
from seqkern import demo
from seqkern.cli import app
from seqkern.ops import _library


def run(*words):
    return CliRunner().invoke(app, list(words))


def test_info_names_version_and_kernels():
    text = run("info").output
    assert seqkern.__version__ in text
    assert ("missing" in text) == (_library.native() is None)
    assert "Triton" in text and "GPU" in text


def test_info_names_the_backends_that_are_there():
    text = run("info").output
    assert "reference, torch" in text and "cuda" not in text.split("backends")[1].splitlines()[0]


def test_verify_tells_what_a_forced_backend_does_not_serve(monkeypatch):
    def refuses(*_):
        raise RuntimeError("it was forced")

    monkeypatch.setattr(seqkern, "verify", refuses)
    done = run("verify")
    assert done.exit_code == 2 and done.output == "seqkern verify: RNN: it was forced\n"


def test_verify_passes_on_torch():
    with seqkern.backend("torch"):
        assert run("verify").exit_code == 0


def test_verify_passes():
    done = run("verify")
    assert done.exit_code == 0, done.output
    assert done.output.count(" ok ") == 10


def test_demo_shows_both_runs_and_draws(tmp_path):
    done = run("demo", "--cell", "gru", "--steps", "3", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert re.search(r"3 steps of training", done.output)
    assert "held-out loss, seqkern" in done.output  # in one piece: the table fits 80 columns
    ran = "cpu" if _library.native() else "torch"
    assert re.search(rf"backend +│ +{ran} │", done.output)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_demo_tells_the_steps_of_each_cell(monkeypatch, tmp_path):
    """Time is shared out, also to the last."""
    monkeypatch.setattr(demo, "SECONDS", 1)
    done = run("demo", "--steps", "3000", "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "3000 steps of training" not in done.output and "stopped after 1 seconds" in done.output
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_demo_writes_in_any_encoding(encoding, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\u2018The \u00e9t\u00e9\u2019 " * 2000, encoding="utf-8")
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert (
        demo.main("rnn", steps=2, output=tmp_path, text=text, hidden=8, batch=2, length=8, console=console)
        == 0
    )
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("words", "says"), [(("--cell", "elman"), "expected one of"), (("--steps", "0"), "at least 1")]
)
def test_demo_refuses(words, says, tmp_path):
    done = run("demo", *words, "--output", str(tmp_path))
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "loss.png").exists()
