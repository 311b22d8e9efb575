import pytest


@pytest.fixture(scope="session")
def detectron2_datasets(tmp_path_factory):
    """$DETECTRON2_DATASETS with the shapes, registered in this process, and the label maps that ADE20K's need."""
    import numpy as np
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from PIL import Image

    from dinat_backbones.adapters.detectron2 import shapes_datasets
    from dinat_backbones.cli import shapes

    folder = tmp_path_factory.mktemp("datasets")
    shapes.make_shapes(folder / "shapes", train=5, val=2, size=64, layouts=shapes.LAYOUTS)
    raw = folder / "shapes" / "annotations"
    for path in (*raw.glob("training/*.png"), *raw.glob("validation/*.png")):
        target = folder / "shapes" / "annotations_detectron2" / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)) - np.uint8(1)).save(target)
    for name in [name for name in DatasetCatalog if name.startswith("shapes_")]:  # of the import, elsewhere
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    shapes_datasets.register_shapes(folder / "shapes")
    return folder
