"""The C++ kernel, built with sanitizers, in a driver that calls it as the package does, on threads of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .core import Session

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "dinat_backbones/ops/backends/cpu/csrc"
DRIVER = Path(__file__).with_name("driver.cpp")
BATCH = 20  # seeds of one process
FLAGS = {
    "address,undefined": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer"],
}
MARKS = {"address,undefined": b"__asan_", "thread": b"__tsan_"}  # names of functions that instrumented code calls


def build(name: str, folder: Path) -> Path:
    """The driver with the library of setup.py, both compiled with a sanitizer, or as it was built before.

    Raises:
        RuntimeError: the compiler is missing or fails.
    """
    target = folder / "driver"
    newest = max(path.stat().st_mtime for path in (DRIVER, *SOURCES.iterdir(), ROOT / "setup.py", Path(__file__)))
    if target.exists() and target.stat().st_mtime > newest:
        return target
    shutil.rmtree(folder, ignore_errors=True)
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("the sanitizers need a C++ compiler: install g++, or name one in CXX")
    flags = [*FLAGS[name], "-g"]
    variables = {name: " ".join(flags) for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")} | {
        "CC": compiler,
        "CXX": compiler,
    }
    words = [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", folder, "--build-temp", folder / "temp"]
    _run(words, cwd=ROOT, env=os.environ | variables)
    (library,) = folder.rglob("_na2d.so")
    if MARKS[name] not in library.read_bytes():
        raise RuntimeError(f"{library} was built without -fsanitize={name}")
    words = [compiler, "-std=c++17", "-O1", *flags, f"-I{SOURCES}", DRIVER, library, f"-Wl,-rpath,{library.parent}"]
    _run([*words, "-pthread", "-o", target])
    return target


def _run(words: list, **settings) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **settings)
    if done.returncode:
        raise RuntimeError(f"{words[0]} ... failed: {(done.stdout + done.stderr)[-2000:]}")


def run(session: Session) -> None:
    """`python tools/fuzz.py sanitizers`."""
    drivers = {}
    for name in FLAGS:
        session.say(f"building with -fsanitize={name}")
        drivers[name] = build(name, ROOT / "work_dirs/fuzz" / name.replace(",", "-"))

    def one(seed: int) -> str:
        """The driver with the numbers from `seed` * BATCH on."""
        name = list(FLAGS)[seed % len(FLAGS)]
        done = subprocess.run([str(drivers[name]), str(seed * BATCH), str(BATCH)], capture_output=True, text=True)
        calls = done.stdout.rpartition(" calls")[0].rpartition("\n")[2]
        assert done.returncode == 0, (done.stdout + done.stderr)[:3000]
        session.outcomes[f"kernel calls under {name}"] += int(calls)
        return f"processes under {name}"

    session.try_each(one)
