"""Whole detectors of mmdet: Mask R-CNN with DiNAT-Mini, Swin-T and ResNet-50, in images per second.

Weights are random and nothing is downloaded. With random weights the number of objects that a detector finds is
arbitrary, and the time in its heads depends on it. So all heads do the same work: their settings are the same, the
RPN must give the 1000 proposals of `test_cfg`, the box head then gets 1000 fixed boxes in their place, the threshold
of each detector lets 1000 scores pass, and NMS must leave 100 detections to the mask head.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

from dinat_backbones import NeighborhoodAttention2D, zoo
from dinat_backbones.cli.common import load_config

from .backbones import random_bias
from .core import Bench, ParityError, Row, Sizes, agree, inference

OURS = "DiNAT-Mini"
CONFIGS = {
    OURS: str(zoo.config_folder() / zoo.DETECTION["mask_rcnn_dinat_mini"].config),
    "Swin-T": "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py",
    "ResNet-50": "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
}


def missing() -> str:
    """What mmdet lacks here and how to install it; empty if nothing."""
    if find_spec("mmdet") is None:
        return 'needs mmdet: pip install "dinat_backbones[openmmlab]"'
    try:
        from dinat_backbones.adapters import mmcv_ext, openmmlab  # noqa: F401  # before mmdet: mmcv's operators

        mmcv_ext.check_installation()
    except ImportError as error:
        return str(error)
    return ""


def model_config(name: str, sizes: Sizes):
    """The packaged or shipped config of a Mask R-CNN, without weights to load."""
    model = load_config(CONFIGS[name]).model
    model.backbone.init_cfg = None
    model.test_cfg.rpn.max_per_img, model.test_cfg.rcnn.max_per_img = sizes.proposals, sizes.detections
    return model


def built(config) -> nn.Module:
    from mmengine.logging import MMLogger
    from mmengine.registry import MODELS, DefaultScope

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(config)
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel("ERROR")  # otherwise three lines for every parameter
    model.init_weights()
    logger.setLevel(level)
    random_bias(model.backbone)
    return model.eval()


class Detector:
    """A detector and one image, with what its heads get."""

    def __init__(self, config, size: tuple[int, int]):
        from mmdet.structures import DetDataSample
        from mmengine.structures import InstanceData

        self.model, (height, width) = built(config), size
        generator = torch.Generator().manual_seed(1)
        self.image = torch.randint(256, (3, height, width), dtype=torch.uint8, generator=generator)
        sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
        data = self.model.data_preprocessor(dict(inputs=[self.image], data_samples=[sample]), False)
        self.samples = data["data_samples"]
        boxes = random_boxes(config.test_cfg.rpn.max_per_img, size, generator)
        self.proposals = [InstanceData(bboxes=boxes)]

    def features(self) -> tuple[torch.Tensor, ...]:
        """The maps of the FPN."""
        data = self.model.data_preprocessor(dict(inputs=[self.image], data_samples=self.samples), False)
        return self.model.extract_feat(data["inputs"])

    def raw(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes and scores of all proposals and classes, before the threshold and NMS."""
        metas = [sample.metainfo for sample in self.samples]
        (result,) = self.model.roi_head.predict_bbox(self.features(), metas, self.proposals, None)
        return result.bboxes, result.scores[:, :-1]  # the last is the background

    def set_threshold(self) -> None:
        """As many scores pass as there are proposals."""
        highest = self.raw()[1].flatten().topk(len(self.proposals[0]) + 1).values
        self.model.roi_head.test_cfg.score_thr = highest[-2:].mean().item()

    def __call__(self):
        """Proposals of the RPN and the detections, from an image to pasted masks."""
        maps = self.features()
        (found,) = self.model.rpn_head.predict(maps, self.samples, rescale=False)
        (detections,) = self.model.roi_head.predict(maps, self.proposals, self.samples, rescale=True)
        return found, detections


def random_boxes(number: int, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Boxes (x1, y1, x2, y2) inside an image, ``[number, 4]``; sides from 4 % to 60 % of the image's short side."""
    sides = min(size) * 0.04 * 15 ** torch.rand(number, 2, generator=generator)
    corners = torch.rand(number, 2, generator=generator) * (torch.tensor(size[::-1]) - sides)
    return torch.cat([corners, corners + sides], 1)


def check_same_heads(configs: dict) -> None:
    for part in ("data_preprocessor", "rpn_head", "roi_head", "test_cfg"):
        for name, config in configs.items():
            if config[part] != configs[OURS][part]:
                raise ParityError(f"Mask R-CNN: {part} with {name} is not that with {OURS}")


def check_same_work(name: str, call: Callable, sizes: Sizes) -> None:
    found, detections = call()
    for what, number, expected in (
        ("proposals", len(found), sizes.proposals),
        ("detections", len(detections), sizes.detections),
        ("masks", len(detections.masks), sizes.detections),
    ):
        if number != expected:
            raise ParityError(f"Mask R-CNN with {name}: {number} {what}, expected {expected}")


def parity_detectors(bench: Bench) -> None:
    if missing():
        return
    detector = Detector(model_config(OURS, Sizes(proposals=50, detections=10)), (96, 128))

    def results(backend: str) -> tuple[torch.Tensor, ...]:
        for module in detector.model.backbone.modules():
            if isinstance(module, NeighborhoodAttention2D):
                module.backend = backend
        return *inference(detector.features)(), *inference(detector.raw)()

    agree(f"Mask R-CNN {OURS}, maps, boxes and scores", results("cpu"), results("tiled"))
    bench.say(f"parity: Mask R-CNN {OURS} agrees with itself on the tiled op: maps of the FPN, boxes and scores")


def detector_rows(bench: Bench) -> list[Row]:
    name, unit = f"Mask R-CNN {OURS}", "images/s"
    others = [other for other in CONFIGS if other != OURS]
    if why := missing():
        return [Row(name, against=f"mmdet {other}", unit=unit, note=why) for other in others]
    configs = {model: model_config(model, bench.sizes) for model in CONFIGS}
    check_same_heads(configs)
    calls = {}
    for model, config in configs.items():
        detector = Detector(config, bench.sizes.image)
        inference(detector.set_threshold)()
        calls[model] = inference(detector)
        check_same_work(model, calls[model], bench.sizes)
        bench.say(f"Mask R-CNN {model}: {bench.sizes.proposals} proposals, {bench.sizes.detections} detections")
    times = bench.times("Mask R-CNN", calls)
    rates = {model: 1e3 / ms for model, ms in times.items()}
    return [
        Row(name, rates[OURS], f"mmdet {other}", rates[other], rates[OURS] / rates[other], unit=unit)
        for other in others
    ]
