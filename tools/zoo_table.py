#!/usr/bin/env python
"""Write what is derived from the table of published models, dinat_backbones/zoo:

python tools/zoo_table.py           docs/model_zoo.md, configs/metafile.yml and model-index.yml (the last two for mim),
                                    the README of each config folder and docs/images/attention-*.svg
python tools/zoo_table.py --check   write nothing, exit with status 1 if one of them is not up to date
"""

import argparse
import sys
from pathlib import Path
from typing import Any

try:
    import yaml
except ModuleNotFoundError:
    sys.exit(f"{sys.argv[0]}: needs PyYAML: pip install pyyaml")

import zoo_pages
from zoo_pages import table

from dinat_backbones import zoo

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {
    "NAT": ("Neighborhood Attention Transformer", "https://arxiv.org/abs/2204.07143"),
    "DiNAT": ("Dilated Neighborhood Attention Transformer", "https://arxiv.org/abs/2209.15001"),
}
INTRODUCTION = """# Model zoo

<!-- written by tools/zoo_table.py from dinat_backbones/zoo -->

Results, parameters and MACs (multiply-accumulates, "FLOPs" in the papers) are the published ones; `tools/get_flops.py
--all` computes both again. The files are those of the original release. `init_cfg` and `tools/convert_checkpoint.py`
read them as they are; `init_cfg` also takes the name of an ImageNet model. Recipes are in the configs.
"""


def documents() -> dict[Path, str]:
    """Content by path, of every file that this tool writes."""
    header = "# Written by tools/zoo_table.py from dinat_backbones/zoo.\n"
    return {
        ROOT / "docs" / "model_zoo.md": _model_zoo(),
        ROOT / "configs" / "metafile.yml": header + yaml.safe_dump(_metafile(), sort_keys=False, width=1000),
        ROOT / "model-index.yml": header + yaml.safe_dump({"Import": ["configs/metafile.yml"]}),
        **zoo_pages.documents(ROOT),
    }


# -------------------------------------------------------------------------------------------------------------- tables


def _model_zoo() -> str:
    sections = [
        INTRODUCTION,
        "## COCO, Mask R-CNN and Cascade Mask R-CNN, 3x\n\nSingle scale, 800 x 1333; MACs at 1280 x 800.\n",
        table(
            ("model", "params", "GMACs", "box AP", "mask AP", "config", "checkpoint"),
            ((r.name, f"{r.params_m}M", r.gmacs, r.box_ap, r.mask_ap, _config(r), _file(r))
             for r in zoo.DETECTION.values()),
        ),
        "## ADE20K, UPerNet, 160k iterations\n\nWhole images; MACs at 2048 x 512, those of `large` at 2560 x 640.\n",
        table(
            ("model", "crop", "params", "GMACs", "mIoU", "multi-scale", "config", "checkpoint"),
            ((r.name, r.size, f"{r.params_m}M", r.gmacs, r.miou_single_scale, r.miou_multi_scale, _config(r), _file(r))
             for r in zoo.SEGMENTATION.values()),
        ),
        "## Mask2Former with DiNAT-Large\n\nSingle scale unless said otherwise; MACs are averages over the validation "
        "images. The files are detectron2's.\n",
        table(
            ("data and task", "params", "GMACs", "PQ", "AP", "mIoU", "multi-scale", "config", "checkpoint"),
            ((r.name, f"{r.params_m}M", r.gmacs, r.pq, r.ap, r.miou, r.miou_multi_scale, _config(r), _file(r))
             for r in zoo.MASK2FORMER.values()),
        ),
        "## ImageNet-1k\n",
        table(
            ("model", "size", "kernel", "params", "GMACs", "top-1", "checkpoint"),
            ((r.name, r.resolution, r.kernel_size or "all", f"{r.params_m}M", r.gmacs, r.top1, _file(r))
             for r in zoo.CLASSIFICATION.values()),
        ),
        "## ImageNet-22k, to start from\n",
        table(
            ("name", "checkpoint"),
            ((name, f"[pth]({url})") for name, url in zoo.PRETRAINED.items() if name not in zoo.CLASSIFICATION),
        ),
        "## Dilation settings\n\nOf `dilations=...` beside `arch=...`, for each of the four stages. A deeper stage "
        "repeats them; a shallower one\ntakes their end.\n",
        table(
            ("name", "for", "kernel", "stage 1", "stage 2", "stage 3", "stage 4", "families"),
            ((f"`{s.name}`", s.task, s.kernel_size, *(", ".join(map(str, stage)) for stage in s.stages),
              ", ".join(s.families)) for s in zoo.DILATION_SETTINGS.values()),
        ),
    ]  # fmt: skip
    return "\n".join(sections)


def _config(row: Any) -> str:
    links = [f"[{row.config.split('/')[0]}](../configs/{row.config})"] if row.config else []
    if isinstance(row, zoo.Mask2Former):
        (file,) = (ROOT / "mask2former" / "configs" / row.name).glob(f"*_{row.arch}_*.yaml")
        links.append(f"[detectron2](../{file.relative_to(ROOT)})")
    return ", ".join(links)


def _file(row: zoo.Row) -> str:
    return f"[{row.checkpoint.rpartition('.')[2]}]({row.checkpoint})"


# ----------------------------------------------------------------------------------------------------- metafile of mim


def _metafile() -> dict[str, Any]:
    rows = [
        row for row in (*zoo.DETECTION.values(), *zoo.SEGMENTATION.values(), *zoo.MASK2FORMER.values()) if row.config
    ]
    return {
        "Collections": [
            {"Name": name, "Paper": {"Title": title, "URL": url}, "README": "docs/model_zoo.md"}
            for name, (title, url) in PAPERS.items()
        ],
        "Models": [_model(row) for row in rows],
    }


def _model(row: Any) -> dict[str, Any]:
    entry = {
        "Name": Path(row.config).stem,
        "In Collection": "NAT" if row.family == "NAT" else "DiNAT",
        "Config": f"configs/{row.config}",
        "Metadata": {"Parameters": row.params_m * 10**6, "FLOPs": row.gmacs * 10**9},
        "Results": [
            {"Task": task, "Dataset": dataset, "Metrics": {metric: value}}
            for task, dataset, metric, value in _results(row)
            if value is not None
        ],
    }
    # mmengine cannot load what detectron2 wrote
    return entry if isinstance(row, zoo.Mask2Former) else entry | {"Weights": row.checkpoint}


def _results(row: Any) -> list[tuple[str, str, str, float | None]]:
    if isinstance(row, zoo.Detection):
        return [
            ("Object Detection", "COCO", "box AP", row.box_ap),
            ("Instance Segmentation", "COCO", "mask AP", row.mask_ap),
        ]
    if isinstance(row, zoo.Segmentation):
        return [
            ("Semantic Segmentation", "ADE20K", "mIoU", row.miou_single_scale),
            ("Semantic Segmentation", "ADE20K", "mIoU(ms+flip)", row.miou_multi_scale),
        ]
    dataset = {"coco": "COCO", "ade20k": "ADE20K", "cityscapes": "Cityscapes"}[row.dataset]
    return [
        ("Panoptic Segmentation", dataset, "PQ", row.pq),
        ("Instance Segmentation", dataset, "mask AP", row.ap),
        ("Semantic Segmentation", dataset, "mIoU", row.miou),
        ("Semantic Segmentation", dataset, "mIoU(ms+flip)", row.miou_multi_scale),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write docs/model_zoo.md and the metafiles of mim from the model table."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a file is not up to date")
    check = parser.parse_args().check
    stale = [path for path, text in documents().items() if not path.is_file() or path.read_text() != text]
    if check and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"not what the table says: {names}; run tools/zoo_table.py")
    for path in stale:
        partial = path.with_suffix(".partial")
        partial.write_text(documents()[path])
        partial.rename(path)
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
