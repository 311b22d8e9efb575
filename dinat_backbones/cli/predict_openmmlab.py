"""`dinat predict` for models of mmdet, mmseg and mmpretrain."""

from pathlib import Path
from typing import Any

from ..checkpoint import read
from ..files import atomic_write
from .common import UnreadableImageError, load_config
from .predict import Predictor, count_labels

MAPS = ("pred_panoptic_seg", "pred_sem_seg")  # fields of a data sample


def load_predictor(config: str, checkpoint: str, device: str | None = None, score: float = 0.3) -> Predictor:
    """Build a config's model with the weights of a checkpoint.

    Args:
        config: a Python file.
        checkpoint: file or http(s) address.
        device: where to run; None for a GPU if there is one, else the CPU.
        score: instances below it are not drawn.

    Raises:
        SystemExit: the config does not exist, or mmengine is not installed.
        FileNotFoundError, ValueError: the checkpoint does not exist or does not fit the model.
    """
    cfg, model, pipeline = load_model(config, checkpoint, device)
    import torch
    from mmengine.registry import DATASETS, VISUALIZERS

    dataset = cfg.test_dataloader.dataset
    visualizer = VISUALIZERS.build(dict(cfg.visualizer, name="predict", vis_backends=None, save_dir=None))
    metainfo = DATASETS.build(dict(dataset, lazy_init=True, pipeline=[])).metainfo
    if not metainfo.get("classes"):  # of mmpretrain, which takes them from the folders of the training images
        metainfo = metainfo | trained_metainfo(checkpoint)
    visualizer.dataset_meta = {"palette": "random"} | {key: value for key, value in metainfo.items() if value}

    def predict(path: Path, target: Path) -> str:
        image = read_image(path)
        data = pipeline(image_dict(image, path))
        with torch.no_grad():
            (result,) = model.test_step({key: [value] for key, value in data.items()})
        threshold = {"pred_score_thr": score} if "pred_instances" in result else {}
        found = describe(result, metainfo["classes"], score)
        for field in MAPS:
            # mmdet cannot draw a panoptic map without segments, and mmseg darkens an image without classes
            if field in result and not map_labels(result, field, len(metainfo["classes"])):
                delattr(result, field)
        with atomic_write(target) as partial:
            if "pred_label" in result:
                visualizer.visualize_cls(image[..., ::-1], result, draw_gt=False, out_file=str(partial), name=path.name)
                return found
            visualizer.add_datasample(
                path.name, image[..., ::-1], result, draw_gt=False, out_file=str(partial), **threshold
            )
        return found

    return predict


def load_model(config: str, checkpoint: str, device: str | None = None) -> tuple[Any, Any, Any]:
    """The config, its model with the weights of a checkpoint, ready to predict, and what prepares an `image_dict` for
    it; arguments and errors as of `load_predictor`."""
    cfg = load_config(config)
    import torch
    from mmcv.transforms import Compose
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from .. import checkpoint as checkpoints

    init_default_scope(cfg.get("default_scope", "mmdet"))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    checkpoints.load_model(model, checkpoint)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    steps = cfg.test_dataloader.dataset.pipeline
    return cfg, model, Compose([step for step in steps if not step.type.rpartition(".")[2].startswith("Load")])


def trained_metainfo(checkpoint: str) -> dict[str, Any]:
    """What mmengine saved about the data that a checkpoint was trained on, such as the names of its classes.

    Raises:
        ValueError: the file does not name the classes.
    """
    meta = read(checkpoint).get("meta")
    found = meta.get("dataset_meta") if isinstance(meta, dict) else None
    if not isinstance(found, dict) or not found.get("classes"):
        raise ValueError(
            f"{checkpoint} does not name its classes, and neither does the config: add "
            "metainfo=dict(classes=[...]) to test_dataloader.dataset"
        )
    return found


def image_dict(image: Any, path: Path) -> dict[str, Any]:
    """An image as the loading steps of a pipeline leave it."""
    size = image.shape[:2]
    return dict(img=image, img_path=str(path), img_id=0, img_shape=size, ori_shape=size)


def read_image(path: Path) -> Any:
    """An image ``[H, W, 3]`` (uint8, BGR); of a GIF the first frame.

    Raises:
        UnreadableImageError: it is not one, or damaged, or empty.
    """
    import cv2
    import mmcv
    import numpy as np
    from PIL import Image

    try:
        image = mmcv.imread(str(path))
    except (OSError, cv2.error):  # the latter for an empty file
        image = None
    if image is None:  # such as a GIF, which OpenCV reads since 4.11 where it was built so
        try:
            image = np.asarray(Image.open(path).convert("RGB"))[..., ::-1]
        except (OSError, SyntaxError, ValueError) as error:
            raise UnreadableImageError("not an image, or damaged") from error
    return np.ascontiguousarray(image)


def describe(result: Any, classes: Any, score: float) -> str:
    """Summary of a data sample: the number of instances per class, and the classes of panoptic and semantic maps;
    of a classifier the class and its score."""
    if "pred_label" in result:
        label = int(result.pred_label)
        return f"{classes[label]} {float(result.pred_score[label]):.2f}"
    parts = []
    names = [name.strip() for name in classes]  # ADE20K has "bed "
    if "pred_instances" in result:
        labels = result.pred_instances.labels[result.pred_instances.scores > score].tolist()
        parts.append(count_labels(labels, names) or "no instance")
    for field in MAPS:
        if field in result:
            parts.append(", ".join(names[label] for label in map_labels(result, field, len(names))) or "nothing")
    return "; ".join(parts)


def map_labels(result: Any, field: str, num_classes: int) -> list[int]:
    """The classes in a panoptic or semantic map of a data sample, sorted."""
    (values,) = (tensor.unique().tolist() for tensor in getattr(result, field).values())
    if field == "pred_panoptic_seg":  # the class plus 1000 times the number of the instance
        values = {value % 1000 for value in values}
    return sorted(value for value in values if value < num_classes)  # further ones are void or ignored
