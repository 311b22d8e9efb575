#!/usr/bin/env python
"""Install the built package into fresh environments of several Python and torch versions, and try it there:

    python tools/check_install.py [PAIR ...] [--out FOLDER] [--keep]

Without arguments all of `PAIRS`. For each: a new environment by `uv`, the wheel or the sdist with its extras (never the
checkout), then the checks of check_models.py: three training iterations, evaluation and prediction of six models, timm,
transformers and ONNX export. Where a pair says "no compiler", PATH is empty and CC and CXX are /bin/false. The
environments are removed when they are done with; `--keep` leaves them. FOLDER (work_dirs/check_install) keeps logs and
results: an interrupted call continues with the next check, a finished pair is only run again after a change of the
package. Ends with a Markdown table, which FOLDER/table.md keeps and README.md shows, and with status 1 if a check
failed. Downloads 3 to 6 GB per torch version.

Needs `uv` (pip install uv), and the Pythons of the pairs where `uv python find` or pyenv has them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("Mask R-CNN", "Cascade", "RetinaNet", "DINO", "UPerNet", "Mask2Former")
OTHERS = ("configs", "timm", "huggingface", "export")
# of OpenMMLab; the last three are imported but not declared
ORIGINAL = (
    *("mmcv==2.1.0", "mmengine==0.10.7", "mmdet==3.3.0", "mmsegmentation==1.2.2"),
    *("ftfy", "regex", "setuptools<81"),
)


@dataclass(frozen=True)
class Pair:
    """One environment.

    Attributes:
        python: version, "3.11".
        torch: version; "" for the newest that this Python has on PyPI.
        extras: of the package.
        requirements: what else is installed; the original releases of OpenMMLab instead of the extra, for example.
        source: "wheel", or "sdist", whose installation would compile the kernel.
        compiler: whether one may be found.
        lowest: whether to install the least versions that the package and its extras allow, not the newest.
    """

    python: str
    torch: str = ""
    extras: tuple[str, ...] = ("openmmlab", "timm", "huggingface", "export")
    requirements: tuple[str, ...] = ()
    source: str = "wheel"
    compiler: bool = False
    lowest: bool = False

    @property
    def checks(self) -> list[str]:
        return [*MODELS, *(name for name in OTHERS if name == "configs" or name in self.extras)]


PAIRS = {
    # transformers 5 and the exporter need a later torch
    "3.10-torch-2.3.1": Pair("3.10", "2.3.1", extras=("openmmlab", "timm")),
    "3.10-torch-2.3.1-numpy-1": Pair(
        "3.10", "2.3.1", extras=("timm",), requirements=("numpy<2", "torchvision==0.18.1", *ORIGINAL)
    ),
    "3.10-lowest": Pair("3.10", extras=("openmmlab", "timm"), lowest=True),
    "3.11-torch-2.11.0": Pair("3.11", "2.11.0"),
    "3.11-newest": Pair("3.11"),
    "3.12-newest": Pair("3.12", source="sdist"),
    "3.13-newest": Pair("3.13"),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="PAIR", help=f"of {', '.join(PAIRS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "work_dirs" / "check_install")
    parser.add_argument("--keep", action="store_true", help="leave the environments")
    args = parser.parse_args()
    unknown = [name for name in args.pairs if name not in PAIRS]
    if unknown:
        parser.error(f"unknown pair {unknown[0]!r}; expected one of {', '.join(PAIRS)}")
    uv = shutil.which("uv") or shutil.which("uv", path=os.path.dirname(sys.executable))
    if uv is None:
        parser.error("uv was not found: pip install uv")
    args.out.mkdir(parents=True, exist_ok=True)
    packages = build(uv, args.out.resolve() / "dist")
    names = args.pairs or list(PAIRS)
    results = {}
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name}", flush=True)
        results[name] = check(uv, name, PAIRS[name], packages, args.out.resolve() / name, args.keep)
    text = table(results)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    errors = [
        f"{name}: {check}: {error}" for name, r in results.items() for check, error in r["checks"].items() if error
    ]
    print(*errors, sep="\n")
    return int(bool(errors))


def build(uv: str, folder: Path) -> dict[str, Path]:
    """The wheel and the sdist of this checkout, by their name in `Pair.source`."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([uv, "build", "--quiet", "--out-dir", folder, ROOT], check=True)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def check(uv: str, name: str, pair: Pair, packages: dict[str, Path], folder: Path, keep: bool) -> dict:
    """Results of one pair, from `folder` if they are there: {"versions": ..., "checks": {name: error or None}}."""
    script = ROOT / "tools" / "check_models.py"
    key = str(zlib.crc32(repr((contents(packages["wheel"]), astuple(pair), script.read_text())).encode()))
    stamp, results = folder / "fingerprint", folder / "results.json"
    if not stamp.is_file() or stamp.read_text() != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        stamp.write_text(key)
    found = json.loads(results.read_text()) if results.is_file() else {"checks": {}}
    if all(found["checks"].get(check, "missing") is None for check in pair.checks):
        print("  finished before")
        return found
    log = folder / "log.txt"
    begin = time.monotonic() - found.get("seconds", 0)
    try:
        with log.open("a") as output:
            python, environment = install(uv, pair, packages[pair.source], folder / "env", output)
            shutil.copy(script, folder)  # away from the checkout, which must not be found
            command = [python, "-W", "ignore", folder / script.name, results, *pair.checks]
            follow(command, folder, environment, output)
        if not results.is_file():
            raise RuntimeError(log.read_text().strip().splitlines()[-1])
        found = json.loads(results.read_text())
        found["checks"] = {check: found["checks"].get(check, "did not finish") for check in pair.checks}
        found["seconds"] = time.monotonic() - begin
        results.write_text(json.dumps(found, indent=1))
    except (RuntimeError, FileNotFoundError) as error:
        found = {"versions": {"python": pair.python, "torch": pair.torch}, "checks": {"installation": str(error)}}
        print(f"  {error}; see {log}")
    finally:
        if not keep:
            shutil.rmtree(folder / "env", ignore_errors=True)
    return found


def contents(package: Path) -> list[tuple[str, int]]:
    """Checksums of what is in a wheel, and of its metadata without README.md."""
    with zipfile.ZipFile(package) as wheel:
        files = [entry for entry in wheel.infolist() if ".dist-info/" not in entry.filename]
        metadata = [wheel.read(name).partition(b"\n\n")[0] for name in wheel.namelist() if name.endswith("/METADATA")]
    return sorted((file.filename, file.CRC) for file in files) + [("METADATA", zlib.crc32(b"".join(metadata)))]


def install(uv: str, pair: Pair, package: Path, target: Path, log: object) -> tuple[Path, dict[str, str]]:
    """A fresh environment with the package: its Python, and the variables that commands in it get."""
    shutil.rmtree(target, ignore_errors=True)
    wanted = [f"{package}[{','.join(pair.extras)}]", f"torch=={pair.torch}" if pair.torch else "torch"]
    interpreter, options = find_python(uv, pair.python), []
    if ORIGINAL[0] in pair.requirements:  # mmcv 2.1.0 is built with what setuptools 81 has removed
        constraint = target.with_name("build-constraint.txt")
        constraint.write_text("setuptools<81\n")
        options = ["--build-constraint", constraint]
    if pair.lowest:
        constraint = target.with_name("lowest.txt")
        command = [uv, "pip", "compile", "--quiet", "--python", interpreter, "--resolution", "lowest-direct"]
        command += [word for extra in pair.extras for word in ("--extra", extra)]
        run([*command, "--output-file", constraint, ROOT / "pyproject.toml"], os.environ, log)
        options = ["--constraint", constraint]
    run([uv, "venv", "--quiet", "--python", interpreter, target], os.environ, log)
    python = target / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if not pair.compiler:
        environment |= {"PATH": str(target.with_name("empty")), "CC": "/bin/false", "CXX": "/bin/false"}
    start = time.monotonic()
    print(f"  installing {' '.join([*wanted, *pair.requirements])}", flush=True)
    run([uv, "pip", "install", "--python", python, *options, *wanted, *pair.requirements], environment, log)
    print(f"  installed in {time.monotonic() - start:.0f} s", flush=True)
    return python, environment


def find_python(uv: str, version: str) -> str:
    """An interpreter of this version: uv's choice, or pyenv's."""
    found = subprocess.run([uv, "python", "find", version], capture_output=True, text=True)
    if found.returncode == 0:
        return found.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for python in sorted(pyenv.glob(f"{version}.*/bin/python{version}")):
        return str(python)
    raise FileNotFoundError(f"Python {version} was not found: uv python install {version}")


def run(command: list, environment: dict, log: object) -> None:
    """A command whose output goes into the log; RuntimeError with its last line if it fails."""
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log.write(result.stdout)
    log.flush()
    if result.returncode:
        raise RuntimeError((result.stdout.strip().splitlines() or ["no output"])[-1])


def follow(command: list, folder: Path, environment: dict, log: object) -> None:
    """check_models.py, printing a line for each finished check."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for line in process.stdout or ():
            log.write(line)
            log.flush()
            if line.startswith("check: "):
                print("  " + line[len("check: ") :], end="", flush=True)
        process.wait()
    finally:
        process.kill()


def table(results: dict[str, dict]) -> str:
    """Markdown: a row for each pair."""
    rows = [("Python", "torch", "numpy", "mmcv", *MODELS, "minutes"), ("---",) * (5 + len(MODELS))]
    for found in results.values():
        versions, checks = found["versions"], found["checks"]
        passed = ["yes" if checks.get(model, "missing") is None else "**no**" for model in MODELS]
        minutes = f"{found['seconds'] / 60:.0f}" if "seconds" in found else ""
        rows.append((*(versions.get(key, "") for key in ("python", "torch", "numpy", "mmcv")), *passed, minutes))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
