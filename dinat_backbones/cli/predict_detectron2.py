"""`dinat predict` for Mask2Former and other models of Detectron2."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .common import UnreadableImageError
from .predict import Predictor, count_labels

RESULTS = {"panoptic": "panoptic_seg", "instance": "instances", "semantic": "sem_seg"}  # the name in a model's output


def load_model(
    config: str, checkpoint: str, device: str | None = None, task: str | None = None
) -> tuple[Any, Callable[[Any], dict[str, Any]]]:
    """Build a config's model with the weights of a checkpoint, which has to have all of them.

    Args:
        config: a YAML file.
        checkpoint: file or http(s) address.
        device: where to run; None for the config's, or the CPU where there is no GPU.
        task: the only result to compute, of `RESULTS`; None for those that the config turns on.

    Returns:
        The metadata of the config's test data, and a function of an image ``[H, W, 3]`` (uint8, BGR) that returns the
        model's results by name.

    Raises:
        ModuleNotFoundError: Detectron2 or Mask2Former is not installed.
        FileNotFoundError, ValueError: a file does not exist, or the checkpoint does not fit the model.
    """
    from ..adapters.detectron2.maskformer_compat import get_config  # before Detectron2: says what is missing

    # isort: split
    import detectron2.data.transforms as T
    import torch
    from detectron2.modeling import build_model

    from ..adapters.detectron2 import shapes_datasets  # noqa: F401  # their names and colours
    from ..adapters.detectron2.data_checks import name_classes
    from ..checkpoint import load_model

    cfg = get_config(config)
    cfg.MODEL.DEVICE = device or (cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu")
    if task:
        for name in RESULTS:
            cfg.MODEL.MASK_FORMER.TEST[f"{name.upper()}_ON"] = name == task
        # Mask2Former requires it where no semantic result is computed
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

    return name_classes(cfg), infer


def load_predictor(
    config: str, checkpoint: str, device: str | None = None, score: float = 0.3, task: str | None = None
) -> Predictor:
    """As `predict_openmmlab.load_predictor`; further arguments and errors as in `load_model`."""
    metadata, infer = load_model(config, checkpoint, device, task)
    from detectron2.data.detection_utils import read_image
    from detectron2.utils.visualizer import Visualizer

    def predict(path: Path, target: Path) -> str:
        try:
            image = read_image(str(path), "BGR")
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImageError(error) from error
        results = {name: value.to("cpu") if hasattr(value, "to") else value for name, value in infer(image).items()}
        name = next(name for name in RESULTS.values() if name in results)
        visualizer = Visualizer(image[..., ::-1], metadata)
        if name == "panoptic_seg":
            segments, infos = results[name]
            drawn = visualizer.draw_panoptic_seg_predictions(segments.cpu(), infos)
            found = count_labels([info["category_id"] for info in infos], metadata.stuff_classes)
        elif name == "instances":
            instances = results[name]
            things = instances.pred_classes < len(metadata.thing_classes)  # first among the classes of a panoptic model
            instances = instances[things & (instances.scores >= score)]
            if not instances.pred_boxes.tensor.any():  # Mask2Former leaves them empty
                instances.remove("pred_boxes")
            drawn = visualizer.draw_instance_predictions(instances)
            found = count_labels(instances.pred_classes.tolist(), metadata.thing_classes)
        else:
            labels = results[name].argmax(0)
            drawn = visualizer.draw_sem_seg(labels)
            classes = dict(enumerate(metadata.stuff_classes))  # a model may have more than the data set
            found = ", ".join(classes[label] for label in labels.unique().tolist() if label in classes)
        with atomic_write(target) as partial:
            drawn.save(str(partial))
        return found or "nothing"

    return predict
