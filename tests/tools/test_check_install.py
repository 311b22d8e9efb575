"""tools/check_install.py without its installations: what is repeated, what the table and the exit status say."""

import json
import zipfile

import check_install
import pytest
from check_install import MODELS, PAIRS, Pair

from helpers import ROOT


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The tool with a package of one file; `runs` lists the checks asked for, whose results are in `runs.results`."""

    class Runs(list):
        results: dict = {}
        code = readme = ""

        def __call__(self, *names):
            monkeypatch.setattr("sys.argv", ["check_install.py", *names, "--out", str(tmp_path / "out")])
            return check_install.main()

    runs = Runs()

    def build(uv, folder):
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
            wheel.writestr("dinat_backbones/__init__.py", runs.code)
            wheel.writestr("dinat_backbones.dist-info/METADATA", f"Name: x\n\n{runs.readme}")
        return dict.fromkeys(("wheel", "sdist"), folder / "package.whl")

    def follow(command, folder, environment, log):
        results, checks = command[4], command[5:]
        runs.append(checks)
        versions = dict(python="3.11.7", torch="2.11.0", numpy="2.4.6", mmcv="onedl-mmcv 2.3.6")
        results.write_text(json.dumps(dict(versions=versions, checks={c: runs.results.get(c) for c in checks})))

    monkeypatch.setattr(check_install, "build", build)
    monkeypatch.setattr(check_install, "follow", follow)
    monkeypatch.setattr(check_install, "install", lambda uv, pair, package, target, log: (target / "python", {}))
    return runs


def test_finished_pairs_are_not_repeated(runs, tmp_path, capsys):
    assert runs("3.11-torch-2.11.0") == 0
    assert runs("3.11-torch-2.11.0", "3.13-newest") == 0
    assert runs == [PAIRS["3.11-torch-2.11.0"].checks, PAIRS["3.13-newest"].checks]
    yes = " | ".join(["yes"] * 6)
    row = f"| 3.11.7 | 2.11.0 | 2.4.6 | onedl-mmcv 2.3.6 | {yes} | 0 |"
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[2:] == [row, row]
    assert row in capsys.readouterr().out.split("3.13-newest\n")[1].splitlines()


def test_a_change_of_the_package_repeats_a_pair_and_one_of_its_readme_does_not(runs):
    assert runs("3.13-newest") == 0
    runs.readme = "with the new table"
    assert runs("3.13-newest") == 0 and len(runs) == 1
    runs.code = "import torch"
    assert runs("3.13-newest") == 0 and len(runs) == 2


def test_failures_are_in_the_table_and_repeated(runs, capsys):
    runs.results = {"DINO": "RuntimeError: no", "export": "ImportError: onnx"}
    assert runs("3.11-torch-2.11.0") == 1
    out = capsys.readouterr().out
    assert "| yes | yes | yes | **no** | yes | yes | 0 |" in out
    assert "3.11-torch-2.11.0: DINO: RuntimeError: no" in out.splitlines()
    runs.results = {}
    assert runs("3.11-torch-2.11.0") == 0 and len(runs) == 2


def test_a_failed_installation(runs, monkeypatch, capsys):
    def install(*args):
        raise RuntimeError("no solution found")

    monkeypatch.setattr(check_install, "install", install)
    assert runs("3.11-torch-2.11.0") == 1
    out = capsys.readouterr().out
    assert "no solution found; see" in out and out.count("**no**") == 6 and runs == []


def test_unknown_pairs_and_pythons(runs, capsys):
    with pytest.raises(SystemExit):
        runs("3.9")
    assert "unknown pair '3.9'; expected one of 3.10-torch-2.3.1," in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match=r"Python 3\.99 was not found: uv python install 3\.99"):
        check_install.find_python("false", "3.99")


def test_every_python_and_the_oldest_torch_are_covered():
    assert {pair.python for pair in PAIRS.values()} == {"3.10", "3.11", "3.12", "3.13"}
    assert {pair.torch for pair in PAIRS.values()} >= {"2.3.1", "2.11.0", ""}
    assert all(set(Pair("3.11").checks) >= set(pair.checks) for pair in PAIRS.values())


def test_readme_shows_a_row_for_every_pair():
    """The table as a run printed it; a version that a pair leaves open is what was the newest then."""
    lines = (ROOT / "README.md").read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| Python | torch |"))
    header, _, *rows = (line.strip("| ").split(" | ") for line in lines[start : start + 2 + len(PAIRS)])
    assert header == ["Python", "torch", "numpy", "mmcv", *MODELS, "minutes"]
    for (name, pair), row in zip(PAIRS.items(), rows, strict=True):
        python, torch, numpy, _, *checks, minutes = row
        assert python.startswith(f"{pair.python}."), name
        assert torch == pair.torch or (not pair.torch and torch[0].isdigit()), name
        assert numpy.startswith("1.") == ("numpy<2" in pair.requirements), name
        assert checks == ["yes"] * len(MODELS) and int(minutes) > 0, name
