"""The configs of an installed package, and how commands find those of a checkout, from folders elsewhere."""

import subprocess
import sys

import pytest
import yaml

from dinat_backbones import zoo
from dinat_backbones.cli.common import resolve_config
from helpers import ROOT, environment

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.config import Config

ROWS = [row for row in (*zoo.DETECTION.values(), *zoo.SEGMENTATION.values(), *zoo.MASK2FORMER.values()) if row.config]
YAML = sorted(file.relative_to(ROOT) for file in ROOT.glob("mask2former/configs/**/*.yaml"))


@pytest.fixture(scope="module")
def site_packages(tmp_path_factory):
    """What an installation puts there, apart from the kernel."""
    folder = tmp_path_factory.mktemp("site-packages")
    build_py = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(build_py, cwd=ROOT, check=True, capture_output=True)
    return folder


def test_installed_configs(site_packages):
    """In the place where mim and mmengine look for them, they are those of the checkout."""
    mim = site_packages / "dinat_backbones" / ".mim"
    index = yaml.safe_load((mim / "model-index.yml").read_text())
    models = [model for file in index["Import"] for model in yaml.safe_load((mim / file).read_text())["Models"]]
    assert {model["Config"] for model in models} == {f"configs/{row.config}" for row in ROWS}
    for row in ROWS[::9]:
        found, expected = (Config.fromfile(folder / "configs" / row.config) for folder in (mim, ROOT))
        assert found._cfg_dict == expected._cfg_dict
    assert YAML and sorted(file.relative_to(mim) for file in mim.glob("mask2former/configs/**/*.yaml")) == YAML


def test_documented_names_lead_to_installed_configs(site_packages, tmp_path):
    mim = site_packages / "dinat_backbones" / ".mim"
    shipped, own = f"configs/{ROWS[0].config}", f"configs/{ROWS[1].config}"
    (tmp_path / own).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / own).touch()  # a file that is there wins
    code = "import sys; from dinat_backbones.zoo import find_config; print(*map(find_config, sys.argv[1:]), sep='\\n')"
    command = [sys.executable, "-c", code, shipped, str(YAML[0]), own, "elsewhere.py"]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment(site_packages), check=True, capture_output=True, text=True
    )
    assert run.stdout.splitlines() == [str(mim / shipped), str(mim / YAML[0]), own, "elsewhere.py"]


def test_configs_of_the_checkout_are_found_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"configs/{ROWS[0].config}"
    assert resolve_config(name) == ROOT / name
    with pytest.raises(SystemExit, match="config configs/nowhere.py is not there$"):
        resolve_config("configs/nowhere.py")
