"""Every Python block of the documentation is executed: those of a page one after the other in one new process, configs
of OpenMMLab as configs.

The files that snippets name are made first, in the folder the process runs in; nothing in a snippet is replaced but
what `SUBSTITUTIONS` lists.
"""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dinat_backbones import create_classifier
from documentation import PAGES, Block, blocks
from helpers import ROOT

PYTHON_PAGES = [page for page in PAGES if blocks(page, "python")]
# What a page needs besides the package
NEEDS = {
    "README.md": ["mmdet"],
    "docs/any_model.md": ["mmdet"],
    "docs/frameworks/torchvision.md": ["torchvision"],
    "docs/frameworks/mmdetection.md": ["mmdet"],
    "docs/frameworks/mmsegmentation.md": ["mmseg", "mmdet"],
    "docs/frameworks/detectron2.md": ["detectron2"],
    "docs/frameworks/transformers.md": ["transformers"],
    "docs/frameworks/timm.md": ["timm"],
}
# Words of the documentation that stand for something of the reader's, and what they are here
SUBSTITUTIONS = {
    '__import__("dinat_backbones").__path__[0] + "/.mim/configs/mmdet/dinat/CONFIG.py"': (
        f'"{ROOT}/configs/mmdet/dinat/mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"'  # no installed copy here
    ),
    '"CONFIG.py"': f'"{ROOT}/configs/mmdet/dinat/mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"',
    '"configs/_base_/fsdp.py"': f'"{ROOT}/configs/_base_/fsdp.py"',
    '"REPOSITORY"': f'"{ROOT}"',
}
# A block that begins so is a config: it is loaded, and the model it describes is built and computes its features.
CONFIG_BEGINNINGS = ("_base_ = ", "custom_hooks = ")
RUN_CONFIG = """
import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, init_default_scope
cfg = Config.fromfile({path!r})
init_default_scope(cfg.get("default_scope", "mmdet"))
import dinat_backbones.adapters.openmmlab  # where the config is a part of another
if "model" in cfg:
    import dinat_backbones
    model = MODELS.build(cfg.model).eval()
    assert isinstance(model.backbone, dinat_backbones.DiNAT), type(model.backbone)
    with torch.no_grad():
        maps = model.extract_feat(torch.zeros(1, 3, 64, 96))
        if hasattr(model, "decode_head"):
            assert model.decode_head(maps).shape[1] == 150
            model.auxiliary_head(maps)
    assert len(maps) >= 4
    checkpoint = (cfg.model.backbone.get("init_cfg") or dict()).get("checkpoint", "")
    if checkpoint.endswith(".pth") and "://" not in checkpoint:  # names and addresses are downloaded
        model.backbone.init_weights()
for hook in cfg.get("custom_hooks", []):
    HOOKS.build(hook)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where snippets run: a file under each name that they load."""
    folder = tmp_path_factory.mktemp("snippets")
    for name in ("dinat_mini", "dinat_tiny"):
        torch.save(create_classifier(name).state_dict(), folder / f"{name}_in1k_224.pth")
    (folder / "retinanet_r50_fpn_1x_coco.py").write_text('_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"')
    if find_spec("transformers"):
        from dinat_backbones.adapters.huggingface import DinatForImageClassification, published_config

        # transformers takes a folder of that name for the model
        model = DinatForImageClassification(published_config("dinat_mini"))
        model.save_pretrained(folder / "shi-labs" / "dinat-mini-in1k-224")
    return folder


def is_config(block: Block) -> bool:
    return block.text.startswith(CONFIG_BEGINNINGS)


def substituted(block: Block) -> str:
    text = block.text
    for words, stand_in in SUBSTITUTIONS.items():
        text = text.replace(words, stand_in)
    return text


@pytest.mark.parametrize("page", PYTHON_PAGES)
def test_snippets_run(page, folder):
    missing = [package for package in NEEDS.get(page, []) if not find_spec(package)]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    script = []
    for block in blocks(page, "python"):
        code = substituted(block)
        if is_config(block):
            path = folder / f"{page.replace('/', '-')}-{block.line}.py"
            path.write_text(code)
            code = RUN_CONFIG.format(path=str(path))
        # line numbers of a traceback are those of the page
        script.append(f"exec(compile({chr(10) * (block.line - 1) + code!r}, {page!r}, 'exec'), namespace)")
    program = "namespace = {'__name__': '__main__'}\n" + "\n".join(script)
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def test_every_substitution_is_used():
    text = "".join(block.text for page in PYTHON_PAGES for block in blocks(page, "python"))
    assert [words for words in SUBSTITUTIONS if words not in text] == []
    assert set(NEEDS) <= set(PYTHON_PAGES)
