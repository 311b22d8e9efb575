"""What a config expects of its data sets, compared with what is registered, before anything is trained."""

import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

INSTANCE_MAPPERS = ("mask_former_instance", "coco_instance_lsj")  # Mask2Former's, for data without stuff
# Metadata that evaluators read, by the results that they evaluate
METADATA_OF_RESULTS = {
    "PANOPTIC": (
        "panoptic_json",
        "panoptic_root",
        "thing_dataset_id_to_contiguous_id",
        "stuff_dataset_id_to_contiguous_id",
    ),
    "SEMANTIC": ("stuff_classes", "ignore_label"),
}


def class_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys of a config that are numbers of classes, and "thing" or "stuff": which names of the metadata they count.

    As in Mask2Former's data sets, the stuff of a panoptic one are all its classes.
    """
    sem_seg, roi_heads = "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.ROI_HEADS.NUM_CLASSES"
    instances = cfg.INPUT.get("DATASET_MAPPER_NAME") in INSTANCE_MAPPERS
    return {
        "MaskFormer": {sem_seg: "thing" if instances else "stuff"},
        "GeneralizedRCNN": {roi_heads: "thing"},
        "RetinaNet": {"MODEL.RETINANET.NUM_CLASSES": "thing"},
        "PanopticFPN": {roi_heads: "thing", sem_seg: "stuff"},
        "SemanticSegmentor": {sem_seg: "stuff"},
    }.get(cfg.MODEL.META_ARCHITECTURE, {})


def number_of_classes(cfg: CfgNode, key: str) -> int:
    """The value of one of `class_keys`."""
    node: Any = cfg
    for part in key.split("."):
        node = node[part]
    return int(node)


def check_registered(cfg: CfgNode, *, train: bool = True) -> None:
    """Check the data sets of a config, and the metadata by which those of DATASETS.TEST are evaluated.

    Args:
        cfg: with the keys of Mask2Former.
        train: whether DATASETS.TRAIN is used.

    Raises:
        ValueError: a data set is not registered, or its metadata lack what evaluation needs.
    """
    for key, names in (("TRAIN", cfg.DATASETS.TRAIN if train else ()), ("TEST", cfg.DATASETS.TEST)):
        for name in names:
            if name not in DatasetCatalog:
                raise ValueError(
                    f"DATASETS.{key}: {name} is not registered; --import MODULE imports the module that does it "
                    "(DatasetCatalog.register, register_coco_instances)"
                )
    for name in cfg.DATASETS.TEST:
        metadata = MetadataCatalog.get(name)
        evaluator_type = metadata.get("evaluator_type")
        wanted = ["evaluator_type"]
        if evaluator_type == "sem_seg":
            wanted += METADATA_OF_RESULTS["SEMANTIC"]
        elif evaluator_type in ("coco_panoptic_seg", "ade20k_panoptic_seg"):
            for result, entries in METADATA_OF_RESULTS.items():
                wanted += entries if cfg.MODEL.MASK_FORMER.TEST[f"{result}_ON"] else ()
        if missing := [entry for entry in wanted if metadata.get(entry) is None]:
            raise ValueError(
                f"DATASETS.TEST: the metadata of {name} lack {', '.join(missing)}, which evaluation needs: "
                f"MetadataCatalog.get({name!r}).set({missing[0]}=...), where the data set is registered, or "
                'DATASETS.TEST "()" to train without evaluation'
            )


def check_classes(cfg: CfgNode, dicts: Sequence[dict[str, Any]]) -> None:
    """Compare the numbers of classes of a config with the names in the metadata of its training data.

    Where there are no names of things, the largest `category_id` of the annotations counts. More classes than the data
    has are logged.

    Args:
        cfg: any config of Detectron2.
        dicts: its training data; sets that are read have all their metadata.

    Raises:
        ValueError: the model has fewer classes than the data.
    """
    for key, part in class_keys(cfg).items():
        number = number_of_classes(cfg, key)
        for name in cfg.DATASETS.TRAIN:
            classes = len(MetadataCatalog.get(name).get(f"{part}_classes") or ())
            if not classes and part == "thing":
                classes = 1 + max(
                    (a["category_id"] for entry in dicts for a in entry.get("annotations", ())), default=-1
                )
            if number < classes:
                raise ValueError(f"{key} is {number}, and {name} has {classes} {part} classes: set {key} {classes}")
            if classes and number > classes:
                logging.getLogger(__name__).warning("%s is %d, and %s has %d classes", key, number, name, classes)


def name_classes(cfg: CfgNode) -> Any:
    """The metadata of a config's test data; missing names of classes become "class 0", "class 1", and so on."""
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else "__unnamed")
    numbers = [number_of_classes(cfg, key) for key in class_keys(cfg)]
    for entry in ("thing_classes", "stuff_classes"):
        if not metadata.get(entry):
            setattr(metadata, entry, [f"class {i}" for i in range(max(numbers, default=0))])
    return metadata
