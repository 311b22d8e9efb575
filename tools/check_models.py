"""What tools/check_install.py runs with the Python of a fresh environment, outside the checkout:

    python check_models.py RESULTS.json CHECK ...

Each check is written into RESULTS.json as soon as it is finished: null if it passed, else its error. One that passed
before is not repeated. The detectors and the segmentor have a small DiNAT, train for three iterations on six drawings,
are evaluated on two more, and draw their predictions for one.
"""

import json
import math
import platform
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import dinat_backbones

CONFIGS = Path(dinat_backbones.__file__).parent / ".mim" / "configs"
DEMOS = {
    "Mask R-CNN": ("mask-rcnn", 160),
    "Cascade": ("cascade-mask-rcnn", 160),
    "UPerNet": ("upernet", 96),
    "Mask2Former": ("mask2former", 96),
}
ITERATIONS = 3


def demo_config(model: str, size: int) -> Any:
    """A shipped demo with its data here. Scores are low after few steps: a panoptic one keeps all segments."""
    from mmengine.config import Config

    cfg = Config.fromfile(CONFIGS / "demo" / f"{model}_dinat_shapes.py")
    text = cfg.dump().replace(f"work_dirs/demo/shapes-{size}/", f"{Path.cwd()}/shapes-{size}/")
    cfg = Config.fromstring(text, ".py")
    if model == "mask2former":
        cfg.model.test_cfg.update(object_mask_thr=0.0, iou_thr=0.0)
    return cfg


def packaged_config(name: str) -> Any:
    """A model of mmdet's own with the backbone replaced, on the data of the demos."""
    import mmdet
    from mmengine.config import Config

    cfg = demo_config("mask-rcnn", 160)
    backbone = cfg.model.backbone  # with the outputs of strides 8, 16 and 32
    cfg.model = Config.fromfile(Path(mmdet.__path__[0]) / ".mim" / "configs" / name).model
    cfg.model.backbone = backbone
    cfg.model.neck.in_channels = [64, 128, 256]
    cfg.model.bbox_head.num_classes = len(cfg.classes)
    cfg.val_evaluator.metric = cfg.test_evaluator.metric = ["bbox"]
    return cfg


def retinanet() -> Any:
    cfg = packaged_config("retinanet/retinanet_r50_fpn_1x_coco.py")
    cfg.model.neck.start_level = 0  # the backbone gives no map of stride 4
    cfg.model.test_cfg.score_thr = 0.0  # after three iterations no score is high
    return cfg


def dino() -> Any:
    cfg = packaged_config("dino/dino-4scale_r50_8xb2-12e_coco.py")
    cfg.model.num_queries = 100  # images of 160x160 have no 900 places to look at
    cfg.model.encoder.num_layers = 2
    return cfg


def train_and_predict(name: str, cfg: Any) -> None:
    """Three iterations, the config's own evaluation, and an image with predictions."""
    import torch
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    from dinat_backbones.cli.predict_openmmlab import load_predictor
    from dinat_backbones.cli.shapes import make_shapes

    for size in (96, 160):
        make_shapes(f"shapes-{size}", 2 * ITERATIONS, 2, size, layouts=("coco", "coco-panoptic", "ade20k"))

    class Recorder(Hook):
        losses: list[float] = []
        metrics: dict[str, float] = {}

        def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
            self.losses.append(float(outputs["loss"]))

        def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
            self.metrics.update(metrics or {})

    cfg.train_cfg.max_epochs = cfg.train_cfg.val_interval = 1
    cfg.train_dataloader.batch_size = 2
    cfg.work_dir = f"{Path.cwd()}/{name.replace(' ', '-')}"
    cfg.log_level = "WARNING"
    Path(cfg.work_dir).mkdir(exist_ok=True)
    cfg.dump(f"{cfg.work_dir}/config.py")
    recorder = Recorder()
    torch.manual_seed(0)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(recorder)
    runner.train()
    if len(recorder.losses) != ITERATIONS or not all(map(math.isfinite, recorder.losses)):
        raise RuntimeError(f"expected {ITERATIONS} finite losses, got {recorder.losses}")
    if not recorder.metrics:
        raise RuntimeError("the evaluation gave no metric")
    checkpoint = Path(cfg.work_dir, "last_checkpoint").read_text().strip()
    predict = load_predictor(f"{cfg.work_dir}/config.py", checkpoint, score=0.0)
    image = next(Path(cfg.data_root).glob("images/validation/*.jpg" if name == "UPerNet" else "val/*.jpg"))
    predict(image, Path(cfg.work_dir, "predictions.png"))


def parse_configs() -> None:
    """Every shipped config that the installed frameworks can read."""
    from mmengine.config import Config

    files = [file for folder in ("mmdet", "mmseg", "demo") for file in sorted((CONFIGS / folder).rglob("*.py"))]
    files = [file for file in files if "_base_" not in file.parts[len(CONFIGS.parts) :]]
    if not files:
        raise RuntimeError(f"{CONFIGS} has no configs")
    for file in files:
        Config.fromfile(file)


def timm_model() -> None:
    import timm
    import torch

    import dinat_backbones.adapters.timm  # noqa: F401

    model = timm.create_model("dinat_mini", features_only=True)
    assert [f.shape[1] for f in model(torch.randn(1, 3, 64, 64))] == model.feature_info.channels()


def huggingface_model() -> None:
    import torch

    from dinat_backbones.adapters.huggingface import DinatBackbone, DinatConfig

    config = DinatConfig(embed_dim=16, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[1], [2]])
    DinatBackbone(config)(torch.randn(1, 3, 64, 64)).feature_maps[-1].sum().backward()


def export_backbone() -> None:
    from dinat_backbones.cli.export import main

    main(["nat_mini", "--format", "onnx", "--size", "32x32", "--check", "--out", "nat_mini.onnx"])


CHECKS: dict[str, Callable[[], None]] = {
    "configs": parse_configs,
    **{name: lambda name=name, demo=demo: train_and_predict(name, demo_config(*demo)) for name, demo in DEMOS.items()},
    "RetinaNet": lambda: train_and_predict("RetinaNet", retinanet()),
    "DINO": lambda: train_and_predict("DINO", dino()),
    "timm": timm_model,
    "huggingface": huggingface_model,
    "export": export_backbone,
}


def describe() -> dict[str, str]:
    """Versions, and the backend that a CPU gets."""
    from dinat_backbones import ops

    found = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    mmcv = next((f"{d.name} {d.version}" for name in ("onedl-mmcv", "mmcv") for d in distributions(name=name)), "none")
    kernel = any(Path(ops.__file__).parent.rglob("_na2d*"))
    return {"python": platform.python_version(), **found, "mmcv": mmcv, "kernel": "compiled" if kernel else "none"}


def main() -> int:
    """Command line."""
    target, names = Path(sys.argv[1]), sys.argv[2:]
    results = json.loads(target.read_text()) if target.is_file() else {"checks": {}}
    results["versions"] = describe()
    for name in names:
        if results["checks"].get(name, "") is None:
            continue
        start = time.monotonic()
        try:
            CHECKS[name]()
            error = None
        except (Exception, SystemExit) as caught:
            traceback.print_exc()
            error = f"{type(caught).__name__}: {caught}".strip().splitlines()[0]
        print(f"check: {name}: {error or 'passed'} ({time.monotonic() - start:.0f} s)", flush=True)
        results["checks"][name] = error
        partial = target.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.replace(target)
    return int(any(results["checks"].values()))


if __name__ == "__main__":
    sys.exit(main())
