#!/usr/bin/env python
"""Draw what Mask2Former, or another model of Detectron2, finds over images:

    python mask2former/predict.py IMAGE|FOLDER --config CONFIG.yaml --checkpoint CHECKPOINT --out FOLDER
                                  [--task panoptic|instance|semantic] [--score 0.3] [--device cuda|cpu|...] [--force]

Without --task it is the first of these that the config turns on. The rest is as in tools/predict.py: images keep
their names, what is there already is skipped without --force, an image that cannot be read is reported.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
_spec = importlib.util.spec_from_file_location("predict_openmmlab", ROOT / "tools" / "predict.py")
tool: Any = importlib.util.module_from_spec(_spec)  # by its path: this file has the same name
_spec.loader.exec_module(tool)

TASKS = {"panoptic": "panoptic_seg", "instance": "instances", "semantic": "sem_seg"}  # what a result calls them


def main() -> None:
    """Command line."""
    parser = tool.argument_parser(__doc__.splitlines()[0], "YAML file of Detectron2")
    parser.add_argument("--task", choices=TASKS, help="which result to draw")
    args = parser.parse_args()
    tool.draw_all(args, lambda: load_predictor(args.config, args.checkpoint, args.device, args.score, args.task))


def load_model(config: str, checkpoint: str, device: str | None = None, task: str | None = None) -> tuple[Any, Any]:
    """Build a config's model with the weights of a checkpoint, all of them, and a function that it infers with.

    Args:
        config, checkpoint: files; the checkpoint may be an http(s) address.
        device: where to run; None for the config's, or the CPU where there is no GPU.
        task: the only result to compute, of `TASKS`; None for those that the config turns on.

    Returns:
        The model's metadata, and a function of an image ``[H, W, 3]`` (uint8, BGR) that returns its results by name.

    Raises:
        SystemExit: Detectron2 or Mask2Former is not installed.
        FileNotFoundError, ValueError: a file is not there, or the checkpoint does not fit the model.
    """
    try:
        from dinat_backbones.adapters.mask2former import get_config
    except ModuleNotFoundError as error:
        tool.stop(str(error))
    import detectron2.data.transforms as T
    import register_shapes  # noqa: F401  # their names and colours
    import torch
    from detectron2.data import MetadataCatalog
    from detectron2.modeling import build_model

    from dinat_backbones.checkpoint import load_model

    cfg = get_config(config)
    cfg.MODEL.DEVICE = device or (cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu")
    if task:
        for name in TASKS:
            cfg.MODEL.MASK_FORMER.TEST[f"{name.upper()}_ON"] = name == task
        # Mask2Former asks for it where nothing semantic is computed
        cfg.MODEL.MASK_FORMER.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE = task != "semantic"
    model = build_model(cfg).eval()
    load_model(model, checkpoint)
    resize = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def infer(image: Any) -> dict[str, Any]:
        height, width = image.shape[:2]
        if cfg.INPUT.FORMAT == "RGB":
            image = image[..., ::-1]
        resized = resize.get_transform(image).apply_image(image)
        tensor = torch.from_numpy(resized.astype("float32").transpose(2, 0, 1))
        with torch.no_grad():
            return model([dict(image=tensor, height=height, width=width)])[0]

    return MetadataCatalog.get(cfg.DATASETS.TEST[0]), infer


def load_predictor(
    config: str, checkpoint: str, device: str | None = None, score: float = 0.3, task: str | None = None
) -> Callable[[Path, Path], str]:
    """As `load_predictor` of tools/predict.py."""
    metadata, infer = load_model(config, checkpoint, device, task)
    from detectron2.data.detection_utils import read_image
    from detectron2.utils.visualizer import Visualizer

    def predict(path: Path, target: Path) -> str:
        try:
            image = read_image(str(path), "BGR")
        except OSError as error:
            raise tool.UnreadableError(error) from error
        result = {name: value.to("cpu") if hasattr(value, "to") else value for name, value in infer(image).items()}
        kind = next(kind for kind in TASKS.values() if kind in result)
        visualizer = Visualizer(image[..., ::-1], metadata)
        if kind == "panoptic_seg":
            segments, infos = result[kind]
            drawn = visualizer.draw_panoptic_seg_predictions(segments.cpu(), infos)
            found = count(info["category_id"] for info in infos)
        elif kind == "instances":
            instances = result[kind]
            things = instances.pred_classes < len(metadata.thing_classes)  # first among the classes of a panoptic model
            instances = instances[things & (instances.scores >= score)]
            if not instances.pred_boxes.tensor.any():  # Mask2Former leaves them empty
                instances.remove("pred_boxes")
            drawn = visualizer.draw_instance_predictions(instances)
            found = count(instances.pred_classes.tolist())
        else:
            labels = result[kind].argmax(0)
            drawn = visualizer.draw_sem_seg(labels)
            found = dict.fromkeys(labels.unique().tolist(), 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.stem}.partial{target.suffix}")
        try:
            drawn.save(str(partial))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        names = metadata.thing_classes if kind == "instances" else metadata.stuff_classes
        words = [f"{number} {names[label]}" if number > 1 else names[label] for label, number in found.items()]
        return ", ".join(words) or "nothing"

    return predict


def count(labels: Any) -> dict[int, int]:
    """Label -> how many there are, in order of the labels."""
    labels = sorted(labels)
    return {label: labels.count(label) for label in labels}


if __name__ == "__main__":
    main()
