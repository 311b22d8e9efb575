"""Parameters and multiply-accumulates (MACs) of models, beside the published figures:

    dinat flops --all
    dinat flops mask_rcnn_dinat_mini dinat_mini configs/mmseg/dinat/CONFIG.py [--size WIDTH HEIGHT]
    dinat flops mask2former/configs/*/*/*.yaml
    dinat flops mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --backbone dinat_tiny

A published model is named by its row in `dinat_backbones.zoo` or by its config, Detectron2's Mask2Former by its YAML
file; classifiers have no config. MACs are counted as the published ones were (fvcore's convention, see
dinat_backbones/ops/flops.py): for a two-stage detector the backbone, neck, RPN head, every box head on 1000 proposals
and every mask head on 100, for other detectors everything, at 1280 x 800; for a segmentor the backbone and the decode
head, but not the auxiliary head, at 2048 x 512, or 2560 x 640 for the models of that size; for a classifier everything,
at its own size. Parameters are the trainable ones.

Models are built on torch's meta device, and nothing is computed. Only the heads of Mask2Former and of the DETR family
run, on zeros, since their shapes depend on values. Mask2Former's published MACs are averages over a validation set;
here they are those of 800 x 800.

Exit status 1 if a published model's parameters do not round to the published million, except those of `PARAMS_M`, or
its MACs differ by more than 0.2 % from the published ones (classifiers: 1 %, as those have three digits or fewer;
Mask2Former: parameters alone).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import create_classifier, zoo
from ..ops.flops import count_macs
from .common import load_config, positive, stop
from .config import add_backbone_options, with_backbone_written

TOLERANCE, TOLERANCE_CLASSIFIER = 0.002, 0.01
# Parameters in millions, rounded, where the published table has less: it truncates 200.94 to 200 and 86.63 to 86, and
# for the 11x11 model, 201.14 with its larger bias tables, it has the number of the 7x7 one.
PARAMS_M = {"dinat_large": 201, "dinat_large_384": 201, "dinat_large_384_11x11": 201, "vitrpb_base": 87}
PROPOSALS, DETECTIONS = 1000, 100
MASK2FORMER_SIZE = (800, 800)
_ROWS: list[Any] = [*zoo.DETECTION.values(), *zoo.SEGMENTATION.values(), *zoo.MASK2FORMER.values()]
CONFIGS: dict[str, Any] = {row.config: row for row in _ROWS if row.config}
NAMES: dict[str, Any] = {**zoo.CLASSIFICATION, **{row.name: row for row in CONFIGS.values()}}


class Count(NamedTuple):
    """One line of the table; `row` is None for a model that was not published."""

    name: str
    row: Any
    params: int
    macs: int
    size: tuple[int, int]  # width, height

    @property
    def failures(self) -> list[str]:
        """Differences from the published figures, in words."""
        if self.row is None:
            return []
        words = []
        params_m = PARAMS_M.get(self.row.name, self.row.params_m)
        if round(self.params / 1e6) != params_m:
            words.append(f"{self.params / 1e6:.2f} M parameters do not round to {params_m} M")
        tolerance = TOLERANCE_CLASSIFIER if isinstance(self.row, zoo.Classification) else TOLERANCE
        if not isinstance(self.row, zoo.Mask2Former) and abs(self.difference) > tolerance:
            words.append(f"{self.macs / 1e9:.1f} G is {self.difference:+.2%} from {self.row.gmacs} G")
        return words

    @property
    def difference(self) -> float:
        """Of the MACs from the published ones, relative to these."""
        return self.macs / 1e9 / self.row.gmacs - 1


def count(name: str, size: tuple[int, int] | None = None) -> Count:
    """Build the model of a published name or a config file, and count it at `size` (width, height) or the usual one.

    Raises:
        SystemExit: neither a known name nor a file, or a model of another kind.
    """
    row = NAMES.get(name)
    if isinstance(row, zoo.Classification):
        with torch.device("meta"):
            model: nn.Module = create_classifier(name).eval()
        size = size or (row.resolution, row.resolution)
    else:
        path = zoo.config_folder() / row.config if row else zoo.find_config(name)
        if row is None:
            row = CONFIGS.get("/".join(path.parts[-3:]))
        if path.suffix == ".yaml" and "dinat_large" in path.stem:
            row = zoo.MASK2FORMER.get("/".join(path.parts[-3:-1]))
        if not path.is_file():
            stop(f"{name} is neither a config file nor one of: {', '.join(NAMES)}")
        cfg, model = _detectron2(path) if path.suffix == ".yaml" else _openmmlab(path)
        name = row.name if row else path.stem
        size = size or _usual_size(row, cfg)
    macs = next((count for has, count in COUNTS.items() if hasattr(model, has)), None)
    if macs is None:
        stop(f"{name}: {type(model).__name__} is not a detector, segmentor, Mask2Former or classifier")
    params = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Count(name, row, params, macs(model, size), size)


def _openmmlab(path: Path) -> tuple[Any, nn.Module]:
    cfg = load_config(str(path))
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmdet")), torch.device("meta"):
        return cfg, MODELS.build(cfg.model).eval()


def _detectron2(path: Path) -> tuple[Any, nn.Module]:
    from ..adapters.detectron2.maskformer_compat import get_config  # before Detectron2: says what is missing

    # isort: split
    from detectron2.modeling import build_model

    cfg = get_config(str(path), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        return cfg, build_model(cfg).eval()


def _usual_size(row: Any, cfg: Any) -> tuple[int, int]:
    if isinstance(row, zoo.Segmentation):
        return row.scale
    mask2former = isinstance(row, zoo.Mask2Former) or "MASK_FORMER" in cfg.get("MODEL", {})
    return MASK2FORMER_SIZE if mask2former else zoo.Detection.flops_input


def _features(model: Any, size: tuple[int, int]) -> tuple[int, Any]:
    """MACs of backbone and neck, and their feature maps."""
    width, height = size
    features: Any = None

    def extract(image):
        nonlocal features
        features = model.extract_feat(image)

    return count_macs(extract, torch.empty(1, 3, height, width, device="meta")), features


def _detector(model: Any, size: tuple[int, int]) -> int:
    macs, features = _features(model, size)
    macs += count_macs(model.rpn_head, features)
    parts = [(model.roi_head.bbox_roi_extractor, model.roi_head.bbox_head, PROPOSALS)]
    if model.roi_head.with_mask:
        parts.append((model.roi_head.mask_roi_extractor, model.roi_head.mask_head, DETECTIONS))
    for extractors, heads, regions in parts:
        for extractor, head in zip(_list(extractors), _list(heads), strict=True):
            shape = (regions, extractor.out_channels, *extractor.roi_layers[0].output_size)
            macs += count_macs(head, torch.empty(shape, device="meta"))
    return macs


def _whole_detector(model: Any, size: tuple[int, int]) -> int:
    """One-stage detectors and those of the DETR family, up to the raw outputs of the head."""
    from mmdet.structures import DetDataSample

    width, height = size
    sample = DetDataSample(metainfo=dict(img_shape=(height, width), batch_input_shape=(height, width)))
    model.requires_grad_(False)  # torch's counter fails on parameters that are passed as arguments to modules
    if hasattr(model, "forward_transformer"):  # its shapes depend on values, so it runs on the CPU
        macs, features = _features(model, size)
        for name, part in model.named_children():
            if name not in ("backbone", "neck", "data_preprocessor"):
                _materialize(part)
        zeros = tuple(torch.zeros(map.shape) for map in features)
        return macs + count_macs(lambda: model.bbox_head.forward(**model.forward_transformer(zeros, [sample])))
    return count_macs(lambda images: model(images, [sample]), torch.empty(1, 3, height, width, device="meta"))


def _list(modules: Any) -> list[Any]:
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]


def _segmentor(model: Any, size: tuple[int, int]) -> int:
    if hasattr(model.decode_head, "pixel_decoder"):
        return _mask2former(model, size, model.decode_head)
    macs, features = _features(model, size)
    return macs + count_macs(model.decode_head, features)


def _mask2former(model: Any, size: tuple[int, int], head: Any) -> int:
    from mmengine.structures import BaseDataElement

    macs, features = _features(model, size)
    _materialize(head)
    width, height = size
    sample = BaseDataElement(metainfo=dict(img_shape=(height, width), batch_input_shape=(height, width)))
    return macs + count_macs(head, [torch.zeros(map.shape) for map in features], [sample])


def _classifier(model: Any, size: tuple[int, int]) -> int:
    width, height = size
    return count_macs(model, torch.empty(1, 3, height, width, device="meta"))


def _mask2former_of_detectron2(model: Any, size: tuple[int, int]) -> int:
    width, height = size
    image = torch.empty(1, 3, height, width, device="meta")
    macs = count_macs(model.backbone, image)
    maps = {
        name: torch.zeros(1, shape.channels, -(-height // shape.stride), -(-width // shape.stride))
        for name, shape in model.backbone.output_shape().items()
    }
    _materialize(model.sem_seg_head)
    return macs + count_macs(model.sem_seg_head, maps)


def _materialize(head: Any) -> None:
    head.to_empty(device="cpu")
    for tensor in (*head.parameters(), *head.buffers()):
        nn.init.zeros_(tensor)


# By an attribute of the model.
COUNTS: dict[str, Callable[[nn.Module, tuple[int, int]], int]] = {
    "roi_head": _detector,
    "panoptic_head": lambda model, size: _mask2former(model, size, model.panoptic_head),
    "bbox_head": lambda model, size: _whole_detector(model, size),
    "mask_head": lambda model, size: _whole_detector(model, size),
    "decode_head": _segmentor,
    "forward_head": _classifier,
    "sem_seg_head": _mask2former_of_detectron2,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME|CONFIG", help="names of published models, config files")
    parser.add_argument("--all", action="store_true", help="all published models")
    parser.add_argument(
        "--size", nargs=2, type=positive, metavar=("WIDTH", "HEIGHT"), help="instead of the published size"
    )
    add_backbone_options(parser)
    args = parser.parse_args(arguments)
    if bool(args.models) == args.all:
        parser.error("give either models or --all")
    names = list(NAMES) if args.all else args.models
    if args.backbone or any("::" in name for name in names):
        names = [name if name in NAMES else with_backbone_written(args, name) for name in names]
    size = tuple(args.size) if args.size else None
    print(f"{'model':38} {'at':>9}  {'params':>8} {'publ.':>5}  {'GMACs':>8} {'publ.':>6} {'diff.':>8}")
    failures = []
    for name in names:
        line = count(name, size)
        at = "{}x{}".format(*line.size)
        text = f"{line.name:38} {at:>9}  {line.params / 1e6:7.2f}M"
        if line.row is None:
            print(f"{text} {'-':>5}  {line.macs / 1e9:8.1f}")
            continue
        note = "  publ.: average over a data set" if isinstance(line.row, zoo.Mask2Former) else ""
        note += "  publ. parameters: not rounded" if name in PARAMS_M else ""
        macs = f"{line.macs / 1e9:8.{2 if isinstance(line.row, zoo.Classification) else 1}f}"
        print(
            f"{text} {line.row.params_m:4}M  {macs} {line.row.gmacs:6} {line.difference:+8.2%}{note}",
            flush=True,
        )
        failures += [f"{line.name}: {words}" for words in line.failures] if size is None else []
    if failures:
        sys.exit("\n".join(failures))
