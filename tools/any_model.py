"""Which models of mmdet and mmseg take a NAT, DiNAT or DiNAT_s for a backbone: every family of packaged configs.

    python tools/any_model.py --rows work_dirs/any_model.jsonl [--families mmdet/dino mmseg/knet ...]
    python tools/any_model.py --rows work_dirs/any_model.jsonl --write docs/any_model.md

Of each family (a folder of configs) the config with the shortest name is swapped with `with_backbone`, or, where that
is refused, the next one that is not. The model is built small and trained for one step on two random images: losses,
backward, finite gradients of every parameter of the backbone, then a prediction. One line of JSON per family is
appended to the file of rows; families that it has already are left out, so that an interrupted run continues.
"""

import argparse
import copy
import json
import logging
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope

from dinat_backbones.adapters.openmmlab.swap import SwapError, find_model, with_backbone

SIZE = 128
# Numbers of a config that cost time and depend on no backbone, and the largest value of each.
LARGE = dict.fromkeys(("num_queries", "num_proposals", "num_dn_queries", "max_per_img", "nms_post"), 50)
LARGE |= dict(nms_pre=200, num=32)
FRAMEWORKS = ("mmdet", "mmseg")
BEGIN, END = "<!-- table: written by tools/any_model.py -->", "<!-- end of table -->"


def config_folder(framework: str) -> Path:
    return Path(__import__(framework).__file__).parent / ".mim" / "configs"


def families() -> list[str]:
    """All families, as "mmdet/dino"."""
    return [
        f"{framework}/{folder.name}"
        for framework in FRAMEWORKS
        for folder in sorted(config_folder(framework).iterdir())
        if folder.is_dir() and folder.name != "_base_"
    ]


def configs(family: str) -> list[Path]:
    """The configs of a family, the shortest name first; those of other backbones and data sets have longer ones."""
    framework, _, name = family.partition("/")
    folder = config_folder(framework) / name
    return sorted(folder.rglob("*.py"), key=lambda path: (len(path.name), path.name))


def load(path: Path) -> Config | None:
    """A config with a model, or None: some files have none, and a few name files that are not packaged."""
    try:
        cfg = Config.fromfile(path, import_custom_modules=False)
    except Exception:
        return None
    return cfg if "type" in (cfg.get("model") or {}) else None


def try_family(family: str, arch: str = "dinat_mini") -> dict[str, Any]:
    """One row of the table: `config`, `result` ("trains", "refused", "fails", "none"), `reason`, `reads`."""
    refused: dict[str, Any] = {}
    for path in configs(family):
        cfg = load(path)
        if cfg is None:
            continue
        name = str(path.relative_to(config_folder(family.partition("/")[0])))
        try:
            swapped = with_backbone(cfg, arch)
        except SwapError as error:
            refused = refused or dict(family=family, config=name, result="refused", reason=str(error))
            continue
        row = dict(family=family, config=name, reads=list(find_model(swapped.model).backbone.out_indices))
        try:
            train_and_predict(swapped)
        except Exception as error:
            if not can_be_built(cfg):  # a fault of the packaged config, whatever its backbone
                continue
            text = (str(error).strip().splitlines() or [""])[0][:200]
            return row | dict(result="fails", reason=f"{type(error).__name__}: {text}")
        return row | dict(result="trains", reason="")
    return refused or dict(family=family, config="", result="none", reason="no config of a model is packaged")


def can_be_built(cfg: Config) -> bool:
    """Whether the framework builds a packaged config's own model."""
    try:
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"):
            MODELS.build(copy.deepcopy(cfg.model))
    except Exception:
        return False
    return True


# ----------------------------------------------------------------------------------------------------- a small model


def shrink(cfg: Config) -> Config:
    """One block per stage, few queries, nothing to download."""
    backbone = find_model(cfg.model).backbone
    backbone.update(depths=[1, 1, 1, 1], init_cfg=None)
    if "dilations" in backbone:
        backbone.dilations = [[2], [1], [2], [1]]
    _shrink(cfg.model)
    if "teacher_ckpt" in cfg.model:
        cfg.model.teacher_ckpt = None
    if "teacher_config" in cfg.model:  # relative to a checkout of mmdet
        cfg.model.teacher_config = str(config_folder("mmdet").parent / cfg.model.teacher_config)
    preprocessor = cfg.model.get("data_preprocessor") or {}
    if cfg.get("default_scope") == "mmseg":
        preprocessor.size = (SIZE, SIZE)
        preprocessor.pop("size_divisor", None)
    if preprocessor.get("test_cfg"):
        preprocessor.test_cfg = dict(size=(SIZE, SIZE))
    if "mode" in (cfg.model.get("test_cfg") or {}):
        cfg.model.test_cfg.mode = "whole"
    return cfg


def _shrink(part: Any) -> None:
    if isinstance(part, (list, tuple)):
        for item in part:
            _shrink(item)
    if not isinstance(part, dict):
        return
    part.pop("init_cfg", None)
    if part.get("type") == "MMSyncBN":  # which wants several processes
        part["type"] = "BN"
    if part.get("pretrained"):
        part["pretrained"] = None
    for key, value in part.items():
        if key in LARGE and isinstance(value, int):
            part[key] = min(value, LARGE[key])
        _shrink(value)


def train_and_predict(cfg: Config) -> None:
    """One step of training and a prediction of a shrunk model; AssertionError if a parameter of the backbone has no
    finite gradient."""
    torch.manual_seed(0)
    for name in ("iter", "epoch"):  # which some losses warm up by
        MessageHub.get_current_instance().update_info(name, 0)
    scope = cfg.get("default_scope") or "mmdet"
    cfg = shrink(cfg)
    with DefaultScope.overwrite_default_scope(scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        samples = segmentation_samples if scope == "mmseg" else detection_samples
        model.init_weights()
        if hasattr(model, "set_epoch"):
            model.set_epoch(0)  # as a hook does before training
        model.train()
        data = model.data_preprocessor(samples(cfg, model), True)
        losses, _ = model.parse_losses(model(**data, mode="loss"))
        losses.backward()
        backbone = (model if hasattr(model, "backbone") else _detector(model)).backbone
        missing = [
            name
            for name, parameter in backbone.named_parameters()
            if parameter.grad is None or not parameter.grad.isfinite().all()
        ]
        assert not missing, f"no finite gradient of {missing}"
        model.eval()
        with torch.no_grad():
            results = model.test_step(samples(cfg, model, training=False))
        assert len(results) > 0


def _detector(model: Any) -> Any:
    return getattr(model, "detector", None) or model.student


def segmentation_samples(cfg: Config, model: Any, training: bool = True) -> dict[str, Any]:
    """Two random images with maps of two classes."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    channels = len(cfg.model.data_preprocessor.get("mean") or "RGB")
    samples = []
    for _ in range(2):
        metainfo = dict(
            img_shape=(SIZE, SIZE), ori_shape=(SIZE, SIZE), pad_shape=(SIZE, SIZE), scale_factor=(1.0, 1.0), flip=False
        )
        sample = SegDataSample(metainfo=metainfo)
        for field in ("gt_sem_seg", "gt_edge_map"):
            sample.set_data({field: PixelData(data=torch.randint(0, 2, (1, SIZE, SIZE)))})
        samples.append(sample)
    return dict(inputs=[torch.randint(0, 256, (channels, SIZE, SIZE)).byte() for _ in samples], data_samples=samples)


def detection_samples(cfg: Config, model: Any, training: bool = True) -> dict[str, Any]:
    """Two random images with boxes, masks and a semantic map of class 0, in the form that the model wants."""
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals, demo_track_inputs

    shape = (3, SIZE, SIZE)
    if cfg.model.type == "BaseReID":
        return reid_samples(training)
    trains_detector_alone = training and "detector" in cfg.model and "track_head" not in cfg.model
    if (hasattr(model, "tracker") or "track_head" in cfg.model) and not trains_detector_alone:
        frames = dict(num_frames=2, key_frames_inds=[0]) if training else dict(num_frames=1)
        return _first_class(demo_track_inputs(batch_size=1, image_shapes=shape, with_mask=True, **frames))
    images = 2 if training else 1  # some models predict for one image at a time
    semantic = (cfg.model.get("roi_head") or {}).get("semantic_head")
    texts = dict(texts=["a person . a dog ."] * images, custom_entities=True)
    data = demo_mm_inputs(
        batch_size=images,
        image_shapes=[shape] * images,
        num_classes=2,
        with_mask="mask" in repr(cfg.model).lower(),
        with_semantic=True,
        sem_seg_output_strides=8 if semantic else 1,
        **(texts if "language_model" in cfg.model else {}),
    )
    proposals = [] if "rpn_head" in cfg.model else demo_mm_proposals([shape] * images, 20)
    for sample, found in zip(data["data_samples"], proposals):  # noqa: B905  # none, or one for each image
        sample.proposals = found
    for i, sample in enumerate(data["data_samples"]):
        sample.set_metainfo(dict(homography_matrix=torch.eye(3).numpy(), img_id=i))
    data = _first_class(data)
    return branches(data) if training and "semi_train_cfg" in cfg.model else data


def branches(data: dict[str, Any]) -> dict[str, Any]:
    """The same images for every branch of a semi-supervised model."""
    names = ("sup", "unsup_teacher", "unsup_student")
    return {key: {name: copy.deepcopy(value) for name in names} for key, value in data.items()}


def reid_samples(training: bool) -> dict[str, Any]:
    from mmdet.structures import ReIDDataSample

    samples = [ReIDDataSample().set_gt_label(i // 2) for i in range(4)]
    images = torch.randint(0, 256, (4, 3, 256, 128)).byte()
    return dict(inputs=list(images), data_samples=samples)


def _first_class(data: dict[str, Any]) -> dict[str, Any]:
    for sample in data["data_samples"]:
        for frame in getattr(sample, "video_data_samples", [sample]):
            frame.gt_instances.labels.zero_()
    return data


# ------------------------------------------------------------------------------------------------------------ table


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The last row of each family."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return list({row["family"]: row for row in rows}.values())


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a table of the families that train per framework, and one of the others with the reasons."""
    order = {family: i for i, family in enumerate(families())}
    rows = sorted(rows, key=lambda row: order.get(row["family"], 0))
    for framework in FRAMEWORKS:
        mine = [row for row in rows if row["family"].startswith(f"{framework}/")]
        trains = [row for row in mine if row["result"] == "trains"]
        yield f"### {framework}: {len(trains)} of {len(mine)} families"
        yield ""
        yield "| family | config | stages read |"
        yield "| --- | --- | --- |"
        for row in trains:
            stages = ", ".join(str(i + 1) for i in row["reads"])
            yield f"| {row['family'].partition('/')[2]} | `{framework}::{row['config']}` | {stages} |"
        yield ""
        yield "| unsupported | config | reason |"
        yield "| --- | --- | --- |"
        for row in mine:
            if row["result"] != "trains":
                name = f"`{framework}::{row['config']}`" if row["config"] else ""
                reason = row["reason"].replace("|", "\\|")
                yield f"| {row['family'].partition('/')[2]} | {name} | {reason} |"
        yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="file of rows, one JSON per line")
    parser.add_argument("--families", nargs="+", help="such as mmdet/dino; default: all that the file has not")
    parser.add_argument("--write", type=Path, help="page that has the table")
    args = parser.parse_args()
    if args.write:
        text = args.write.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        args.write.write_text("\n".join([f"{before}{BEGIN}", "", *table(read_rows(args.rows)), f"{END}{after}"]))
        return
    warnings.filterwarnings("ignore")
    MMLogger.get_instance("any_model", log_level="ERROR")
    logging.disable(logging.WARNING)
    done = {row["family"] for row in read_rows(args.rows)}
    args.rows.parent.mkdir(parents=True, exist_ok=True)
    for family in args.families or [family for family in families() if family not in done]:
        begin = time.perf_counter()
        row = try_family(family)
        with args.rows.open("a") as file:
            file.write(json.dumps(row) + "\n")
        seconds = time.perf_counter() - begin
        print(f"{family}: {row['result']} {row['config']} {row['reason']} {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
