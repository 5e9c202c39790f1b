"""The shape of the package: which room may import which, what an import costs, and what it must not do."""

import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import seqkern
from seqkern.ops import _library

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "seqkern"
KERNELS = ROOT / "kernels"

# A room imports from rooms on lower floors and from itself. `spec`, `kernels` and `_native` know nobody.
FLOORS = {
    0: {"spec", "kernels", "_native", "_version"},
    1: {"ops"},
    2: {"functional"},
    3: {"nn"},
    4: {"swap", "dispatcher", "testing", "report", "charmodel"},
    5: {"integrations", "explanation", "tune", "distributed", "testing_attention", "testing_decoding"},
    6: {"verification", "bench"},
    7: {"demo"},
    8: {"cli"},
    9: {"__main__"},
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
LEAVES = {"spec": {"torch"}, "kernels": {"torch", "triton"}, "charmodel": {"torch"}}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="only a checkout knows what belongs to it")
def test_a_source_archive_holds_what_is_needed_to_build_and_test(tmp_path):
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "egg_info",
        "-e",
        str(tmp_path),
        "sdist",
        "-d",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    command = ["git", "ls-files"]
    tracked = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    wanted = {name for name in tracked if not name.startswith(".")}
    assert wanted <= held
    folders = {str(parent) for name in held for parent in Path(name).parents}
    beyond = {name for name in held - wanted - folders - {""} if "egg-info" not in name}
    assert beyond <= {"PKG-INFO", "setup.cfg"}


def sources() -> list[tuple[str, Path]]:
    """(dotted name, file) of every module but the package's own face, which may show any room."""
    found = [
        (f"seqkern.{p.relative_to(PACKAGE).with_suffix('')}".replace(os.sep, "."), p)
        for p in PACKAGE.rglob("*.py")
    ]
    found += [(f"seqkern.kernels.{p.stem}", p) for p in KERNELS.glob("*.py")]
    return sorted((name, p) for name, p in found if name != "seqkern.__init__")


def imports(name: str, path: Path) -> set[str]:
    """Dotted names that a file imports anywhere; `from seqkern import nn` counts as seqkern.nn."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = name.split(".")[: -node.level]
                base = ".".join([*above, base] if base else above)
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "seqkern" else {base}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module"
        ):
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def room_of(dotted: str) -> str:
    return dotted.split(".")[1]


@pytest.mark.parametrize(("name", "path"), [pytest.param(*s, id=s[0]) for s in sources()])
def test_imports_run_one_way(name, path):
    room = room_of(name)
    assert room in FLOOR, f"{path} is a new room: give it a floor in this test"
    for other in sorted(i for i in imports(name, path) if i.startswith("seqkern.")):
        there = room_of(other)
        if there == room or there not in FLOOR:  # a public name such as `from seqkern import accelerate`
            assert there == room or room_of(f"seqkern.{there}") in seqkern.__all__, (
                f"{name} imports unknown {other}"
            )
            continue
        assert FLOOR[there] < FLOOR[room], f"{name} ({room}) must not import {other} ({there})"


@pytest.mark.parametrize("room", LEAVES)
def test_leaves_import_torch_and_themselves(room):
    for name, path in sources():
        if room_of(name) != room:
            continue
        for other in imports(name, path):
            top = other.split(".")[0]
            ours = top == "seqkern" and room_of(other) == room
            assert ours or top in LEAVES[room] or top in sys.stdlib_module_names, f"{name} imports {other}"


def python(code: str, *, cwd: Path | None = None, **environment: str) -> str:
    """What a fresh interpreter prints for the code, warnings being errors once torch is imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SEQKERN_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_works_without_triton_and_without_compiled_kernels():
    out = python(
        "import sys, torch\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton' or name == 'seqkern._native':\n"
        "            raise ModuleNotFoundError(f'{name} is blocked', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import seqkern\n"
        "lstm = seqkern.nn.LSTM(3, 4)\n"
        "output, _ = lstm(torch.zeros(2, 1, 3))\n"
        "output.sum().backward()\n"
        "assert lstm.weight_hh_l0.grad is not None\n"
        "q = torch.zeros(1, 1, 2, 4)\n"
        "seqkern.functional.attention(q, q, q, softcap=1.0)\n"
        "from seqkern.ops import _library\n"
        "assert _library.native() is None and _library.why_missing()\n"
        "print(tuple(output.shape))\n"
    )
    assert out == "(2, 1, 4)"


def test_import_swaps_nothing_and_stays_light():
    python(
        "import sys, torch\n"
        "import torch.nn.functional as F\n"
        "def state():\n"
        "    names = ('RNN', 'LSTM', 'GRU', 'RNNCell', 'LSTMCell', 'GRUCell', 'Transformer', 'MultiheadAttention')\n"
        "    classes = [getattr(torch.nn, n) for n in names]\n"
        "    functions = [F.scaled_dot_product_attention, torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh]\n"
        "    return [*classes, *(c.forward for c in classes), *(c.__init__ for c in classes), *map(id, functions)]\n"
        "before, modules = state(), set(sys.modules)\n"
        "import seqkern\n"
        "assert state() == before\n"
        "new = {m.split('.')[0] for m in set(sys.modules) - modules}\n"
        "heavy = new & {'triton', 'matplotlib', 'rich', 'typer', 'onnx', 'onnxruntime', 'hypothesis', 'pytest'}\n"
        "assert not heavy, heavy\n"
        "assert not torch.cuda.is_initialized()\n"
        "seqkern.functional.attention\n"
        "assert 'triton' not in sys.modules and 'seqkern.kernels' not in sys.modules\n"
    )


def test_import_costs_little_beyond_torch():
    """Processor time, which a busy machine does not stretch, of everything that a first use of the modules loads."""
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        "import seqkern\n"
        "seqkern.nn, seqkern.functional\n"
        "print(time.process_time() - start)\n"
    )
    python(code)  # writes the bytecode
    seconds = [float(python(code)) for _ in range(3)]
    assert statistics.median(seconds) <= 0.150, seconds


def test_kernels_is_refused_under_another_name():
    out = python("try:\n    import kernels\nexcept ImportError as e:\n    print(e)", cwd=ROOT)
    assert "seqkern.kernels" in out
    assert python("import seqkern.kernels; print(seqkern.kernels.__name__)", cwd=ROOT) == "seqkern.kernels"


def test_version_is_written_once():
    literal = re.escape(seqkern.__version__)
    hits = [
        path.relative_to(ROOT)
        for path in [
            *ROOT.glob("*.toml"),
            ROOT / "setup.py",
            *PACKAGE.rglob("*.py"),
            *(ROOT / "csrc").rglob("*.[ch]*"),
        ]
        if re.search(rf"""['"]{literal}['"]""", path.read_text())
    ]
    assert hits == [Path("python/seqkern/_version.py")]


def weak_symbols(object_file: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "--defined-only", "-C", str(object_file)], capture_output=True, text=True, check=True
    ).stdout
    return [m.group(2) for m in re.finditer(r"^[0-9a-f]* ([VvWwu]) (.*)$", listing, re.MULTILINE)]


def test_kernels_load_where_they_were_built():
    built = json.loads((PACKAGE / "_build.json").read_text())
    assert built["native"] == (_library.native() is not None), built["reason"] or _library.why_missing()


@pytest.mark.built
def test_isas_share_no_code():
    """The linker keeps one of several weak definitions: shared, it could be the one for a newer processor."""
    builds = sorted((ROOT / "build" / "native").glob("*/_native*.so"), key=lambda p: p.stat().st_mtime)
    assert builds, "the compiled part is not built in this checkout: make build"
    isas = re.compile(r"_(baseline|avx\w+)$")
    sources = [each.stem for each in (ROOT / "csrc" / "cpu").glob("*.cpp") if isas.search(each.stem)]
    assert len(sources) >= 11
    for source in sources:
        (each,) = builds[-1].parent.glob(f"*{source}.cpp.o")
        foreign = [s for s in weak_symbols(each) if "seqkern::isa_" not in s and not s.startswith("DW.ref.")]
        assert not foreign, f"{each.name} defines {foreign[:5]} for every ISA at once"
