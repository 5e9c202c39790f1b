"""Builds the compiled part of seqkern: every file under csrc becomes one module, seqkern._native.

SEQKERN_BUILD=auto (default)  what this machine can build; without a compiler, Python only
SEQKERN_BUILD=cpu | cuda      that part, or an error
SEQKERN_BUILD=none            Python only
SEQKERN_SANITIZE=1            AddressSanitizer and UBSan; use with `build --build-lib DIR`

What was built, or why nothing was, is written to seqkern/_build.json, which `seqkern info` reads.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
MODULE = "seqkern._native"
TORCH_TARGET = "0x020b000000000000"  # the stable ABI of torch 2.11: one binary serves every torch since
LIBRARIES = ["-ltorch", "-ltorch_cpu", "-lc10"]  # found by name: torch is imported before seqkern._native
MODES = ("auto", "cpu", "cuda", "none")
SANITIZE = os.environ.get("SEQKERN_SANITIZE", "") not in ("", "0")


class CannotBuild(Exception):
    """Why there will be no compiled kernels; shown by `seqkern info`."""


def mode() -> str:
    name = os.environ.get("SEQKERN_BUILD") or "auto"
    if name not in MODES:
        raise SystemExit(f"SEQKERN_BUILD is {name!r}, expected one of {', '.join(MODES)}")
    return name


def sources() -> list[Path]:
    return sorted(p for p in CSRC.rglob("*.cpp") if "cuda" not in p.relative_to(CSRC).parts)


def find_compiler() -> str:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "c++"):
        path = shutil.which(name.split()[0])
        if path:
            return path
    raise CannotBuild(f"no C++ compiler found ({wanted or 'g++'}); install g++ >= 11")


def find_package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CannotBuild(f"the package {name} is not there to build against; pip install {name}")
    return Path(next(iter(spec.submodule_search_locations)))


def toolchain() -> tuple[list[str], list[str]]:
    """The compile and the link command, without files. Starts no process, does not import torch."""
    if mode() == "none":
        raise CannotBuild("switched off at install by SEQKERN_BUILD=none")
    if mode() == "cuda":
        raise CannotBuild("this version has no CUDA sources; use SEQKERN_BUILD=cpu")
    if not sources():
        raise CannotBuild(
            "the C++ sources (csrc/) are not in this copy of the package, but in its repository"
        )
    if sys.platform != "linux":
        raise CannotBuild(f"kernels are built on Linux only, this is {sys.platform}")
    compiler = find_compiler()
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").is_file():
        raise CannotBuild(f"Python's headers are missing ({python}/Python.h); install python3-dev")
    torch, pybind11 = find_package("torch"), find_package("pybind11")
    if not (torch / "include/torch/csrc/stable/library.h").is_file():
        raise CannotBuild("torch's headers are missing or older than 2.11; pip install 'torch>=2.11'")
    flags = [
        "-std=c++20",
        "-fopenmp",
        "-fPIC",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wall",
        "-Wextra",
    ]
    flags += ["-Wno-psabi"]
    if SANITIZE:
        flags += [
            "-O1",
            "-g",
            "-fno-omit-frame-pointer",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=undefined",
        ]
    else:
        flags += ["-O3"]
    compile_ = [
        compiler,
        *flags,
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    ]
    compile_ += [f"-I{CSRC}"]
    for folder in (torch / "include", torch / "include/torch/csrc/api/include", pybind11 / "include", python):
        compile_ += ["-isystem", str(folder)]
    link = [compiler, "-shared", "-fopenmp", f"-L{torch / 'lib'}", "-Wl,--no-as-needed"]
    if SANITIZE:
        link += ["-fsanitize=address,undefined"]
    return compile_, link


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise CannotBuild(f"the C++ compiler {command[0]} failed: {first}")


def dependencies(depfile: Path) -> list[Path]:
    """The files that the compiler read for an object; empty if it is not known."""
    if not depfile.is_file():
        return []
    text = depfile.read_text().replace("\\\n", " ")
    return [Path(name.replace("\\ ", " ")) for name in re.findall(r"(?:\\ |\S)+", text.split(":", 1)[1])]


def is_fresh(target: Path, inputs: list[Path]) -> bool:
    if not target.is_file() or not inputs:
        return False
    made = target.stat().st_mtime
    return all(p.is_file() and p.stat().st_mtime < made for p in inputs)


def build_module() -> Path:
    """Compiles what changed since the last call and links; returns the shared object."""
    compile_, link = toolchain()
    version = subprocess.run([compile_[0], "--version"], capture_output=True, text=True).stdout.splitlines()[
        :1
    ]
    torch_version = (find_package("torch") / "version.py").read_text()
    key = hashlib.sha256("\0".join([*compile_, *version, torch_version]).encode()).hexdigest()[:10]
    folder = ROOT / "build" / ("sanitize" if SANITIZE else "native") / f"{sys.implementation.cache_tag}-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    objects = {
        source: folder / (str(source.relative_to(CSRC)).replace("/", "-") + ".o") for source in sources()
    }

    def compile_one(source: Path) -> None:
        target = objects[source]
        if not is_fresh(target, dependencies(target.with_suffix(".d"))):
            print(f"compiling {source.relative_to(ROOT)}", flush=True)
            target.unlink(missing_ok=True)
            run(
                [
                    *compile_,
                    "-MMD",
                    "-MF",
                    str(target.with_suffix(".d")),
                    "-c",
                    str(source),
                    "-o",
                    str(target),
                ]
            )

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_one, objects))
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    names = folder / "linked.txt"
    listing = "\n".join(o.name for o in objects.values())
    if not (is_fresh(module, list(objects.values())) and names.is_file() and names.read_text() == listing):
        print(f"linking {module.name}", flush=True)
        run([*link, *map(str, objects.values()), *LIBRARIES, "-o", str(module)])
        names.write_text(listing)
    return module


def record(package: Path, reason: str) -> None:
    package.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"native": not reason, "mode": mode(), "reason": reason}, indent=1)
    (package / "_build.json").write_text(text + "\n")


def complain(reason: str) -> None:
    if mode() in ("cpu", "cuda"):
        raise SystemExit(f"SEQKERN_BUILD={mode()}: {reason}")
    line = "*" * 100
    print(
        f"{line}\nWARNING: seqkern is installed without compiled kernels: {reason}\n{line}", file=sys.stderr
    )


def planned() -> str:
    """Empty if the module can be tried, else why not."""
    try:
        toolchain()
    except CannotBuild as error:
        return str(error)
    return ""


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        package = ROOT / "python/seqkern" if self.editable_mode else Path(self.build_lib) / "seqkern"
        reason = planned()
        if reason:
            complain(reason)
            for stale in package.glob("_native*.so"):
                stale.unlink()
        record(package, reason)


class BuildNative(build_ext):
    def run(self) -> None:
        for ext in self.extensions or ():
            target = Path(self.get_ext_fullpath(ext.name))
            try:
                module, reason = build_module(), ""
            except CannotBuild as error:
                reason = str(error)
                complain(reason)
                target.unlink(missing_ok=True)
            else:
                # Replaced in one step: a process that runs on the old one keeps it.
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = target.with_name(f".{target.name}.{os.getpid()}")
                shutil.copy2(module, scratch)
                os.replace(scratch, target)
            record(target.parent, reason)


setup(
    packages=[*find_packages("python"), "seqkern.kernels"],
    # A wheel without kernels is a pure one; a build that was asked for by name is tried, and fails aloud.
    ext_modules=[Extension(MODULE, sources=[], optional=True)]
    if mode() in ("cpu", "cuda") or not planned()
    else [],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
