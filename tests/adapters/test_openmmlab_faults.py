"""What people leave in configs of mmdet and mmseg, and what they are told."""

import sys

import pytest
import torch

from dinat_backbones import create_classifier

pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.config import Config  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

import dinat_backbones.adapters.openmmlab as adapter  # noqa: E402

SMALL = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], mlp_ratio=2.0, kernel_size=3)


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = adapter.DiNAT(arch="dinat_mini", dilations="coco")
        self.neck = torch.nn.Conv2d(64, 4, 1)


def runner_with(model):
    """Enough of mmengine's Runner for its `load_checkpoint`."""
    runner = Runner.__new__(Runner)
    runner.model = model
    runner._hooks = []
    runner.logger = MMLogger.get_current_instance()
    return runner


@pytest.mark.parametrize("layout", ["bare", "timm"])
def test_load_from_a_classification_file_stops(tmp_path, layout):
    state = create_classifier("dinat_mini").state_dict()
    torch.save(state if layout == "bare" else dict(state_dict=state, epoch=3), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"load_from: the file has a backbone alone .* this Detector.*model\.backbone"
                                         r"\.init_cfg=dict\(type=\"Pretrained\", checkpoint=FILE\)"):  # fmt: skip
        runner_with(Detector()).load_checkpoint(str(tmp_path / "file.pth"))


def test_load_from_a_detector_still_loads(tmp_path):
    """All of it, and one with other heads, which mmengine allows."""
    whole, model = Detector(), Detector()
    whole.more = torch.nn.Linear(1, 1)
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / "file.pth")
    runner_with(model).load_checkpoint(str(tmp_path / "file.pth"))
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("left", [
    dict(pretrained="open-mmlab://resnet50_v1c"),
    dict(pretrained="open-mmlab://resnet50_v1c", init_cfg=dict(type="Pretrained", checkpoint="dinat_mini")),
    dict(init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50")),
])  # fmt: skip
def test_weights_of_another_backbone(left):
    with pytest.raises(Exception) as caught:
        MODELS.build(dict(type="DiNAT", **SMALL, **left))
    message = str(caught.value)
    assert "has no weights of a DiNAT; if it is left from another backbone in a base config" in message
    assert "model.pretrained=None" in message and "resnet50" in message


def test_arguments_of_another_backbone():
    message = r"DiNAT has no argument depth \(it has depths\), in_channels \(it has in_chans\), norm_eval; in a config"
    with pytest.raises(TypeError, match=message):
        MODELS.build(dict(type="DiNAT", **SMALL, depth=50, in_channels=3, norm_eval=True))


def test_the_scope_of_a_framework():
    """`type="mmdet.DiNAT"` in any framework's config."""
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    import mmdet.models  # noqa: F401

    assert "mmdet" in sys.modules
    adapter.backbones.register_with_imported_frameworks()  # as where a script imports mmdet before the config
    for scope in ("mmdet", "mmengine"):
        with DefaultScope.overwrite_default_scope(scope):
            assert type(MODELS.build(dict(type="mmdet.DiNAT", **SMALL))).__name__ == "DiNAT"


MASK2FORMER = """
_base_ = "{mmseg}/mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py"
custom_imports = dict(imports=["mmdet.models", "dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
layer = dict(self_attn_cfg=dict(embed_dims=32, num_heads=2), ffn_cfg=dict(embed_dims=32, feedforward_channels=32))
model = dict(
    data_preprocessor=dict(test_cfg={test_cfg}),
    backbone=dict(_delete_=True, type="DiNAT", embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8], mlp_ratio=2.0,
                  kernel_size=3),
    decode_head=dict(
        in_channels=[16, 32, 64, 128], feat_channels=32, out_channels=32, num_queries=5,
        pixel_decoder=dict(encoder=dict(num_layers=1, layer_cfg=layer), positional_encoding=dict(num_feats=16)),
        positional_encoding=dict(num_feats=16),
        transformer_decoder=dict(num_layers=1, layer_cfg=dict(cross_attn_cfg=layer["self_attn_cfg"], **layer))),
    test_cfg=dict(mode={mode!r}, crop_size=(64, 64), stride=(48, 48)))
"""


@pytest.mark.parametrize("mode, test_cfg, works", [
    ("whole", dict(size_divisor=32), True), ("slide", None, True), ("slide", dict(size_divisor=32), False)
])  # fmt: skip
def test_mask2former_of_mmseg_on_images_larger_than_the_crop(tmp_path, mode, test_cfg, works):
    """Of sliding windows, mmseg resizes masks to `pad_shape` where images are padded; `dinat test` says so."""
    mmseg = pytest.importorskip("mmseg", reason="mmseg is not installed")
    pytest.importorskip("mmdet", reason="mmdet is not installed")
    from mmseg.structures import SegDataSample

    folder = f"{mmseg.__path__[0]}/.mim/configs"
    (tmp_path / "config.py").write_text(MASK2FORMER.format(mmseg=folder, mode=mode, test_cfg=test_cfg))
    cfg = Config.fromfile(tmp_path / "config.py")
    with DefaultScope.overwrite_default_scope("mmseg"):
        model = MODELS.build(cfg.model).eval()
        sample = SegDataSample(metainfo=dict(img_shape=(96, 130), ori_shape=(96, 130)))
        data = dict(inputs=[torch.zeros(3, 96, 130, dtype=torch.uint8)], data_samples=[sample])
        if works:
            with torch.no_grad():
                (result,) = model.test_step(data)
            assert result.pred_sem_seg.data.shape == (1, 96, 130)
        else:
            with pytest.raises(RuntimeError), torch.no_grad():
                model.test_step(data)
