"""Models of mmdet and mmseg, as packaged, with DiNAT-Mini: loss, backward and prediction."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
import mmdet
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData

from dinat_backbones.adapters import mmcv_ext, openmmlab  # noqa: F401  # registers the backbones

CHANNELS = [64, 128, 256, 512]
DETECTORS = [
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py",
    "retinanet/retinanet_r50_fpn_1x_coco.py",
    "rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py",
    "dino/dino-4scale_r50_8xb2-12e_coco.py",
    "mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    # operators that the others leave out
    "tood/tood_r50_fpn_1x_coco.py",
    "dyhead/atss_r50-caffe_fpn_dyhead_1x_coco.py",
]
COMPILED_FOR_CUDA_ONLY = [
    "dcn/faster-rcnn_r50_fpn_dpool_1x_coco.py",
    "carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py",
    "guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py",
]


def packaged_model(framework, config):
    return Config.fromfile(Path(framework.__file__).parent / ".mim" / "configs" / config).model


def with_mini(model):
    """The model's config with DiNAT-Mini in place of its own backbone."""
    indices = (1, 2, 3) if model.backbone.type == "CSPNeXt" else model.backbone.out_indices
    channels = [CHANNELS[index] for index in indices]
    model.backbone = dict(type="DiNAT", arch="dinat_mini", dilations="coco", out_indices=indices)
    model.pop("pretrained", None)  # weights of its own backbone
    model.data_preprocessor.pop("batch_augments", None)  # which fills images up to 1024 x 1024
    if "rpn_proposal" in model.get("train_cfg", ()):  # fewer regions
        model.train_cfg.rpn_proposal.max_per_img = model.test_cfg.rpn.max_per_img = 50
        for stage in model.train_cfg.rcnn if isinstance(model.train_cfg.rcnn, list) else [model.train_cfg.rcnn]:
            stage.sampler.num = 16
    if "num_queries" in model:  # fewer than there are pixels, and fewer layers
        model.num_queries, model.encoder.num_layers, model.decoder.num_layers = 20, 2, 2
    neck = model.get("neck")
    if neck is not None:
        (neck[0] if isinstance(neck, list) else neck).in_channels = channels
    elif "panoptic_head" in model:
        model.panoptic_head.in_channels = channels
    elif "decode_head" in model:
        model.decode_head.in_channels = channels
        model.auxiliary_head.in_channels = channels[2]
    return model


def trains_and_predicts(model, inputs, samples):
    """Whether all losses are finite and reach the backbone; the predictions."""
    model.init_weights()  # before, the level embeddings of Deformable DETR and DINO are memory as it was found
    data = model.data_preprocessor(dict(inputs=inputs, data_samples=samples), True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert loss.isfinite()
    grads = [parameter.grad for parameter in model.backbone.parameters() if parameter.grad is not None]
    assert len(grads) > 50 and all(grad.isfinite().all() for grad in grads)
    model.eval()
    predictions = []
    with torch.no_grad():
        for image, sample in zip(inputs, samples, strict=True):  # one by one, as guided anchoring needs it
            data = model.data_preprocessor(dict(inputs=[image], data_samples=[sample]), False)
            predictions += model(**data, mode="predict")
    return predictions


@pytest.mark.parametrize("config", DETECTORS + COMPILED_FOR_CUDA_ONLY, ids=lambda config: config.split("/")[0])
def test_detectors(config):
    if config in COMPILED_FOR_CUDA_ONLY and mmcv_ext.operators_in_use() != mmcv_ext.DESCRIPTION:
        pytest.skip("compiled mmcv has an operator of this model for CUDA only")
    from mmdet.registry import MODELS
    from mmdet.testing import demo_mm_inputs

    torch.manual_seed(0)
    MessageHub.get_current_instance().update_info("epoch", 0)  # TOOD asks for it
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(with_mini(packaged_model(mmdet, config)))
        data = demo_mm_inputs(2, [(3, 96, 96)] * 2, num_classes=80, with_mask=True)
        predictions = trains_and_predicts(model, data["inputs"], data["data_samples"])
    assert [set(sample.pred_instances.keys()) >= {"labels", "scores"} for sample in predictions] == [True, True]


def test_segmentor():
    mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
    from mmseg.registry import MODELS
    from mmseg.structures import SegDataSample

    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = with_mini(packaged_model(mmseg, "upernet/upernet_r50_4xb4-80k_ade20k-512x512.py"))
        model.data_preprocessor.size = (96, 96)
        model.decode_head.norm_cfg = model.auxiliary_head.norm_cfg = dict(type="BN")
        model = MODELS.build(model)
        samples = [SegDataSample(metainfo=dict(img_shape=(96, 96), ori_shape=(96, 96))) for _ in range(2)]
        for sample in samples:
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 150, (1, 96, 96)))
        predictions = trains_and_predicts(model, [torch.randint(0, 255, (3, 96, 96)).byte() for _ in samples], samples)
    assert [sample.pred_sem_seg.data.shape for sample in predictions] == [(1, 96, 96)] * 2
