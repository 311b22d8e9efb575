"""Families of packaged configs of mmdet and mmseg with another backbone: a step of training and a prediction each.

A few families of every way of reading a backbone's maps are tried always, all of them where DINAT_ALL_MODELS=1 (an hour
on two cores). tools/any_model.py does the same and writes the table of docs/any_model.md.
"""

import os
import re

import pytest

from helpers import ROOT

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
import any_model

PAGE = (ROOT / "docs" / "any_model.md").read_text()
FEW = [
    "mmdet/deformable_detr",
    "mmdet/retinanet",
    "mmdet/rtmdet",
    "mmdet/yolo",
    "mmdet/yolof",
    "mmseg/deeplabv3plus",
    "mmseg/encnet",
    "mmseg/fastfcn",
    "mmseg/fcn",
    "mmseg/maskformer",
    "mmseg/segformer",
]


def documented(framework):
    """Families that train and families that do not, of the page's tables."""
    _, _, text = PAGE.partition(f"### {framework}: ")
    trains, _, others = text.partition("\n###")[0].partition("| unsupported |")
    return [
        [f"{framework}/{name}" for name in re.findall(r"^\| ([\w.+]+) \| `", part, re.MULTILINE)]
        for part in (trains, others)
    ]


MMDET, MMSEG = documented("mmdet"), documented("mmseg")


def check(family):
    row = any_model.try_family(family)
    assert row["result"] == "trains", row


@pytest.mark.parametrize("family", FEW)
def test_a_few_families_train_and_predict(family):
    check(family)


ALL = os.environ.get("DINAT_ALL_MODELS") == "1"


@pytest.mark.skipif(not ALL, reason="all families of mmdet and mmseg take an hour: DINAT_ALL_MODELS=1")
@pytest.mark.parametrize("family", [f for f in MMDET[0] + MMSEG[0] if f not in FEW] if ALL else ["all families"])
def test_every_documented_family_trains_and_predicts(family):
    check(family)


def test_the_page_has_every_family():
    assert len(MMDET[0]) >= 55 and len(MMSEG[0]) >= 38
    missing = [name for name in any_model.families() if f"| {name.partition('/')[2]} |" not in PAGE]
    assert not missing
    assert set(FEW) <= {*MMDET[0], *MMSEG[0]}
