"""mmcv's operators are in place whatever a user starts with; each way in a Python process of its own."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools

from dinat_backbones import zoo
from helpers import ROOT

pytest.importorskip("mmcv", reason="mmcv is not installed: pip install 'dinat_backbones[openmmlab]'")
from dinat_backbones.adapters import mmcv_ext
from dinat_backbones.cli import shapes

INSTALL = "pip install 'dinat_backbones[openmmlab]'"
STAND_IN = mmcv_ext.operators_in_use() == mmcv_ext.DESCRIPTION
REPORT = "import mmcv._ext; print('stand-in', hasattr(mmcv._ext, 'STAND_IN'))"


def python(*arguments, code=0, cwd=None):
    run = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)
    assert run.returncode == code, (run.stdout + run.stderr)[-3000:]
    return run.stdout + run.stderr


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory):
    """What the wheel installs there, apart from the kernel."""
    folder = tmp_path_factory.mktemp("site-packages")
    python("setup.py", "-q", "build_py", "--build-lib", folder, cwd=copy_of_sources(tmp_path_factory.mktemp("sources")))
    return folder


def copy_of_sources(folder):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "model-index.yml", "dinat_mmcv_finder.py"):
        shutil.copy(ROOT / name, folder)
    for name in ("configs", "dinat_backbones", "mask2former"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


def start(site_packages):
    """Code that does what Python's start-up does with an installed package."""
    return f"import site; site.addsitedir({str(site_packages)!r})"


@pytest.mark.parametrize("framework", ["mmdet", "mmseg"])
def test_installed_package_needs_no_import(site_packages, framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed: {INSTALL}")
    first = f"from {framework}.apis import {'DetInferencer' if framework == 'mmdet' else 'MMSegInferencer'}"
    log = python("-c", f"{start(site_packages)}\n{first}\nfrom mmcv.ops import RoIPool\n{REPORT}", cwd=site_packages)
    assert f"stand-in {STAND_IN}" in log
    assert log.count("mmcv's operators: ") == STAND_IN


def test_start_up_imports_one_module(site_packages):
    code = f"import sys, site; before = set(sys.modules); site.addsitedir({str(site_packages)!r}); "
    log = python("-I", "-S", "-c", code + "print(*(set(sys.modules) - before))")
    assert log.split() == ["dinat_mmcv_finder"]


def test_adapter_first():
    pytest.importorskip("mmdet", reason=f"mmdet is not installed: {INSTALL}")
    code = (
        "import dinat_backbones.adapters.openmmlab\nfrom mmdet.apis import init_detector\nfrom mmcv.ops import RoIPool"
    )
    log = python("-c", f"{code}\n{REPORT}")
    assert f"stand-in {STAND_IN}" in log
    (line,) = (line for line in log.splitlines() if "mmcv's operators: " in line)
    assert (mmcv_ext.DESCRIPTION in line) == STAND_IN and ("_ext" in line)


@pytest.mark.skipif(not STAND_IN, reason="mmcv has compiled operators here, which any order finds")
def test_adapter_too_late_is_said():
    """Without the start-up file: a checkout on PYTHONPATH."""
    pytest.importorskip("mmdet", reason=f"mmdet is not installed: {INSTALL}")
    code = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if getattr(f, '__name__', '') != 'StandInFinder']\n"
        "import mmdet.apis\nimport dinat_backbones.adapters.openmmlab"
    )
    (line,) = (line for line in python("-c", code).splitlines() if "WARNING - mmdet had been imported" in line)
    assert "import dinat_backbones.adapters.openmmlab first" in line


def test_compiled_module_wins(tmp_path):
    (tmp_path / "mmcv").mkdir()
    (tmp_path / "mmcv" / "__init__.py").touch()
    (tmp_path / "mmcv" / "_ext.py").touch()
    code = "from dinat_backbones.adapters import mmcv_ext; mmcv_ext.install(); print(mmcv_ext.operators_in_use()); "
    log = python("-c", f"{code}{REPORT}", cwd=tmp_path)
    path = tmp_path / "mmcv" / "_ext.py"
    assert f"\n{path}\nstand-in False" in log and f"mmcv's operators: {path}" in log


def run_command_with_mmcv(folder, **files):
    """The last line of `dinat flops CONFIG` with an mmcv of these modules."""
    (folder / "mmcv").mkdir()
    for name, text in files.items():
        (folder / "mmcv" / f"{name}.py").write_text(text)
    row = next(iter(zoo.DETECTION.values()))
    code = "import sys; from dinat_backbones.cli import main; main(sys.argv[1:])"  # which finds mmcv in `folder` first
    return python("-W", "ignore", "-c", code, "flops", row.name, code=1, cwd=folder).splitlines()[-1]


def test_mmcv_1_is_one_sentence(tmp_path):
    message = run_command_with_mmcv(tmp_path, __init__='__version__ = "1.7.2"')
    assert message.startswith("dinat flops: mmcv 1.7.2 is installed and mmcv 2 is needed: pip ")
    assert message.endswith('pip install "onedl-mmcv>=2.3"')


def test_compiled_operators_that_do_not_load_are_one_sentence(tmp_path):
    raising = 'raise ImportError("_ext.so: undefined symbol: _ZN3c10\\nmore")'
    message = run_command_with_mmcv(tmp_path, __init__='__version__ = "2.1.0"', _ext=raising)
    assert message.startswith(
        "dinat flops: mmcv's compiled operators do not load (_ext.so: undefined symbol: _ZN3c10), "
    )
    assert ": pip install --no-build-isolation" in message


def test_adapter_without_mmcv():
    code = "import sys; sys.modules['mmcv'] = None\nfrom dinat_backbones.adapters import mmcv_ext\n"
    assert python("-c", code + "mmcv_ext.install(); print(mmcv_ext.operators_in_use())") == "None\n"


@pytest.mark.parametrize("framework, demo", [("mmdet", "mask-rcnn"), ("mmseg", "upernet")])
def test_packaged_training_script(tmp_path, framework, demo):
    """`mim train` runs this script. The config's custom_imports are the first that it hears of dinat_backbones."""
    package = pytest.importorskip(
        framework, reason=f"{framework} is not installed: pip install 'dinat_backbones[openmmlab]'"
    )
    layout, size = ("coco", 160) if framework == "mmdet" else ("ade20k", 96)
    shapes.make_shapes(tmp_path / "work_dirs" / "demo" / f"shapes-{size}", train=2, val=1, size=size, layouts=[layout])
    script = Path(package.__file__).parent / ".mim" / "tools" / "train.py"
    config = ROOT / "configs" / "demo" / f"{demo}_dinat_shapes.py"
    options = ["train_cfg.max_epochs=1", "train_cfg.val_interval=1", "train_dataloader.batch_size=2"]
    options += ["optim_wrapper.optimizer.fused=False"]  # which torch 2.3 has on CUDA only
    log = python(script, config, "--work-dir", tmp_path / "run", "--cfg-options", *options, cwd=tmp_path)
    assert log.count("mmcv's operators: ") == 1
    assert "Epoch(val)" in log and (tmp_path / "run" / "epoch_1.pth").is_file()


@pytest.mark.skipif(
    int(setuptools.__version__.split(".")[0]) < 68, reason="setuptools is older than pyproject.toml asks for"
)
@pytest.mark.parametrize("how", ["build_wheel", "build_editable"])
def test_wheels_have_the_start_up_file(tmp_path, monkeypatch, how):
    sources = copy_of_sources(tmp_path)
    monkeypatch.setenv("CC", "false")  # the kernel takes a minute, and is optional
    monkeypatch.setenv("CXX", "false")
    python("-c", f"from setuptools import build_meta; build_meta.{how}({str(tmp_path)!r})", cwd=sources)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        assert file.read("dinat_mmcv_finder.pth") == b"import dinat_mmcv_finder\n"
