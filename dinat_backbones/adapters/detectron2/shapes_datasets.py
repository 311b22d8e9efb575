"""The data sets of `dinat shapes` under Detectron2's names, in $DETECTRON2_DATASETS/shapes; the import registers them.

    dinat shapes datasets/shapes --layout coco coco-panoptic ade20k cityscapes

| name, {} is train or val          | like                                    | layouts it needs                    |
|-----------------------------------|-----------------------------------------|-------------------------------------|
| shapes_panoptic_{}                | coco_2017_{}_panoptic_with_sem_seg      | coco, coco-panoptic, cityscapes     |
| shapes_instance_{}                | coco_2017_{}                            | coco                                |
| shapes_ade20k_sem_seg_{}          | ade20k_sem_seg_{}                       | ade20k, and annotations_detectron2/ |
| shapes_cityscapes_sem_seg_{}      | cityscapes_fine_sem_seg_{}              | cityscapes                          |

As for ADE20K, `annotations_detectron2` holds the label maps of `annotations` counted from 0, with 255 for unlabelled.
The panoptic set takes its label maps for mIoU from the Cityscapes layout, which has them as Detectron2 reads them.
"""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg, register_coco_instances

THINGS = ("circle", "triangle", "ring")  # CLASSES of cli/shapes.py, in the order of its category ids 1, 2, 3
CLASSES = (*THINGS, "background")
COLORS = [(27, 158, 119), (217, 95, 2), (117, 112, 179), (120, 120, 120)]  # RGB
# as in Mask2Former's own sets, the stuff classes include the things: evaluators read them as the list of all classes
THING_META = dict(
    thing_classes=list(THINGS),
    thing_colors=COLORS[: len(THINGS)],
    thing_dataset_id_to_contiguous_id={index + 1: index for index in range(len(THINGS))},
)
STUFF_META = dict(stuff_classes=list(CLASSES), stuff_colors=COLORS, ignore_label=255)


def register_shapes(root: Path) -> None:
    """Register all sets of the table above; nothing is read before a set is used.

    Args:
        root: the folder that `dinat shapes` wrote, or will write.
    """
    for split, ade_split in (("train", "training"), ("val", "validation")):
        instances = root / "annotations" / f"instances_{split}.json"
        register_coco_instances(f"shapes_instance_{split}", dict(THING_META), str(instances), str(root / split))
        _register(
            f"shapes_panoptic_{split}",
            partial(load_panoptic, root, split),
            evaluator_type="coco_panoptic_seg",
            image_root=str(root / split),
            panoptic_root=str(root / "annotations" / f"panoptic_{split}"),
            panoptic_json=str(root / "annotations" / f"panoptic_{split}.json"),
            json_file=str(instances),
            label_divisor=1000,
            stuff_dataset_id_to_contiguous_id={index + 1: index for index in range(len(CLASSES))},
            **THING_META,
        )
        _register(
            f"shapes_ade20k_sem_seg_{split}",
            partial(
                load_sem_seg,
                str(root / "annotations_detectron2" / ade_split),
                str(root / "images" / ade_split),
            ),
            evaluator_type="sem_seg",
        )
        _register(
            f"shapes_cityscapes_sem_seg_{split}",
            partial(load_cityscapes, root, split),
            evaluator_type="sem_seg",  # the Cityscapes evaluator requires the real data set's 19 classes
        )


def _register(name: str, load: Callable[[], list[dict]], **metadata: Any) -> None:
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**STUFF_META, **metadata)


def load_panoptic(root: Path, split: str) -> list[dict]:
    """Dataset dicts for Mask2Former's panoptic mappers and Detectron2's evaluators of panoptic data sets."""
    content = json.loads((root / "annotations" / f"panoptic_{split}.json").read_text())
    images = {image["id"]: image for image in content["images"]}
    return [
        dict(
            file_name=str(root / split / images[annotation["image_id"]]["file_name"]),
            image_id=annotation["image_id"],
            height=images[annotation["image_id"]]["height"],
            width=images[annotation["image_id"]]["width"],
            pan_seg_file_name=str(root / "annotations" / f"panoptic_{split}" / annotation["file_name"]),
            sem_seg_file_name=str(_label_map(root, split, Path(annotation["file_name"]).stem)),
            segments_info=[
                info | dict(category_id=info["category_id"] - 1, isthing=info["category_id"] <= len(THINGS))
                for info in annotation["segments_info"]
            ],
        )
        for annotation in content["annotations"]
    ]


def load_cityscapes(root: Path, split: str) -> list[dict]:
    """Dataset dicts of the images and their labelTrainIds; FileNotFoundError if there are no images."""
    images = sorted((root / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    if not images:
        raise FileNotFoundError(f"no images in {root / 'leftImg8bit' / split}: dinat shapes --layout cityscapes")
    return [
        dict(file_name=str(path), sem_seg_file_name=str(_label_map(root, split, path.stem.split("_")[1])))
        for path in images
    ]


def _label_map(root: Path, split: str, number: str) -> Path:
    return root / "gtFine" / split / "shapes" / f"shapes_{number}_000000_gtFine_labelTrainIds.png"


register_shapes(Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "shapes")
