"""What an installation consists of, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import dinat_backbones

PACKAGE = Path(dinat_backbones.__file__).parent


def test_every_folder_of_modules_is_a_package():
    """Otherwise setuptools leaves it out of the wheel, and only an editable installation still finds it."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert PACKAGE / "adapters" in folders
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_import_brings_torch_and_nothing_heavier():
    code = "import torch, sys; before = set(sys.modules); import dinat_backbones; print(*(set(sys.modules) - before))"
    new = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "dinat_backbones.backbone" in new
    frameworks = {"mmengine", "mmcv", "mmdet", "mmseg", "detectron2", "transformers", "timm", "natten", "triton"}
    assert {name.split(".")[0] for name in new} & frameworks == set()


def test_public_names():
    for name in dinat_backbones.__all__:
        assert getattr(dinat_backbones, name).__doc__
