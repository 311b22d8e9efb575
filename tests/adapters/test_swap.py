"""adapters/openmmlab/swap.py: what `with_backbone` changes in packaged configs, what it refuses, `dinat config`."""

import copy
import subprocess
import sys
from collections import defaultdict

import pytest
import torch

from dinat_backbones import zoo
from helpers import ROOT

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

from dinat_backbones.adapters.openmmlab.swap import SwapError, changes, with_backbone
from dinat_backbones.cli.common import resolve_config

READY = ROOT / "configs" / "any_model"
RETINANET = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"
DEFORMABLE_DETR = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
DINO = "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py"
FCN = "mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py"
# ready config, the packaged one that it changes
PAIRS = {
    "mmdet/faster-rcnn_dinat-tiny_fpn_1x_coco.py": "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py",
    "mmdet/retinanet_dinat-tiny_fpn_1x_coco.py": RETINANET,
    "mmdet/fcos_dinat-tiny_fpn_gn-head_1x_coco.py": "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py",
    "mmdet/dino-4scale_dinat-tiny_8xb2-12e_coco.py": DINO,
    "mmdet/deformable-detr_dinat-tiny_16xb2-12e_coco.py": DEFORMABLE_DETR,
    "mmdet/rtmdet-ins_dinat-tiny_8xb2-12e_coco.py": "mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py",
    "mmseg/dinat-tiny_segformer-head_8xb2-160k_ade20k-512x512.py": (
        "mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py"
    ),
    "mmseg/dinat-tiny_fcn_4xb4-80k_ade20k-512x512.py": FCN,
    "mmseg/dinat-tiny_knet-s3-upernet_8xb2-adamw-80k_ade20k-512x512.py": (
        "mmseg::knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py"
    ),
}


def load(name):
    return Config.fromfile(resolve_config(name), import_custom_modules=False)


def swap(name, arch="dinat_tiny", **options):
    return with_backbone(load(name), arch, **options)


def parameter_groups(cfg):
    """Learning rate and weight decay of every parameter, by name."""
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.init_cfg = None
    cfg.model.backbone.update(depths=[1, 1, 1, 1])
    if "dilations" in cfg.model.backbone:
        cfg.model.backbone.dilations = [[1]] * 4
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def comparable(value):
    """Tuples and lists alike, without entries that are None and what mmengine adds to configs of other packages."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items() if item is not None and key != "_scope_"}
    return [comparable(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_a_detector_reads_the_stages_with_the_strides_it_read():
    cfg = swap(RETINANET, "dinat_mini")
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch, backbone.dilations) == ("DiNAT", "dinat_mini", "coco")
    assert backbone.out_indices == [1, 2, 3]  # FPN began at level 1 of four
    assert (cfg.model.neck.in_channels, cfg.model.neck.start_level) == ([128, 256, 512], 0)
    assert backbone.init_cfg.checkpoint == "dinat_mini"
    assert cfg.custom_imports.imports == ["dinat_backbones.adapters.openmmlab"]


@pytest.mark.parametrize(
    "name, out_indices, expected",
    [
        ("mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py", [1, 2, 3], {"neck.in_channels": [768, 384, 192]}),
        ("mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py", [3], {"neck.in_channels": 768}),
        ("mmdet::detr/detr_r50_8xb2-150e_coco.py", [3], {"neck.in_channels": [768]}),
        (
            "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
            [0, 1, 2, 3],
            {"panoptic_head.in_channels": [96, 192, 384, 768]},
        ),
        (
            "mmseg::pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py",
            [2, 3],
            {"decode_head.in_channels": 768, "decode_head.in_index": 1, "auxiliary_head.in_index": 0},
        ),
        (
            "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py",
            [0, 2, 3],
            {"decode_head.c1_in_channels": 96, "decode_head.in_index": 2, "auxiliary_head.in_channels": 384},
        ),
        (
            "mmseg::knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512.py",
            [2, 3],
            {"decode_head.kernel_generate_head.in_channels": 768, "decode_head.kernel_generate_head.in_index": 1},
        ),
        # without lateral connections the head computes with the last of three maps alone
        (
            "mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py",
            [2, 3],
            {"decode_head.in_channels": [384, 768], "decode_head.in_index": (0, 1)},
        ),
        # the neck made a pyramid of a plain ViT
        (
            "mmseg::vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py",
            [0, 1, 2, 3],
            {"neck": None, "decode_head.in_channels": [96, 192, 384, 768], "auxiliary_head.in_channels": 768},
        ),
    ],
)
def test_channels_and_indices_follow(name, out_indices, expected):
    model = swap(name, "dinat_s_tiny").model
    assert model.backbone.out_indices == out_indices
    for path, value in expected.items():
        part = model
        for key in path.split("."):
            part = part.get(key)
        assert comparable(part) == comparable(value), path


@pytest.mark.parametrize(
    "name, reason",
    [
        ("mmdet::ssd/ssd300_coco.py", "SSDNeck"),
        ("mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py", "6 maps for 2 images"),
        ("mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py", "shared_head"),
        ("mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py", "rfp_backbone"),
        ("mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py", r"strides \[4, 4\]"),
        ("mmdet::misc/d2_mask-rcnn_r50-caffe_fpn_ms-90k_coco.py", "has no `backbone`"),
        ("mmdet::common/ms_3x_coco.py", "no model"),
        ("mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py", "gives a list"),
        ("mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py", r"strides \[8, 4, 8, 16, 32\]"),
        ("mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py", "other maps in training"),
        ("mmseg::unet/unet-s5-d16_fcn_4xb4-40k_drive-64x64.py", r"strides \[2, 1\]"),
        ("mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py", "LRASPPHead does not run"),
    ],
)
def test_what_is_tied_to_its_backbone_is_refused_with_the_reason(name, reason):
    with pytest.raises(SwapError, match=reason):
        swap(name)


def test_the_given_config_is_left_alone():
    cfg = load(FCN)
    before = copy.deepcopy(cfg.to_dict())
    with_backbone(cfg, "nat_mini")
    assert cfg.to_dict() == before


def test_sgd_becomes_adamw_and_the_least_learning_rate_follows():
    cfg = swap(FCN)
    groups = parameter_groups(cfg)
    assert cfg.optim_wrapper.optimizer.type == "AdamW"
    no_decay = {name for name, (_, decay) in groups.items() if decay == 0}
    assert {name for name in groups if name.startswith("backbone") and ("norm" in name or "rpb" in name)} <= no_decay
    assert not any("qkv" in name or "mlp" in name for name in no_decay)
    assert {lr for lr, _ in groups.values()} == {6e-5}
    old, new = load(FCN), cfg
    ratio = new.optim_wrapper.optimizer.lr / old.optim_wrapper.optimizer.lr
    assert new.param_scheduler[0].eta_min == pytest.approx(old.param_scheduler[0].eta_min * ratio)


def test_adamw_and_the_backbones_own_learning_rate_stay():
    cfg, old = swap(DINO), load(DINO)
    assert cfg.optim_wrapper.optimizer == old.optim_wrapper.optimizer
    found = defaultdict(set)
    for name, numbers in parameter_groups(cfg).items():
        exempt = name.startswith("backbone") and ("norm" in name or "rpb" in name)
        found[name.split(".")[0] == "backbone", exempt].add(numbers)
    assert found[True, True] == {(1e-5, 0.0)}
    assert found[True, False] == {(1e-5, 1e-4)}
    assert found[False, False] == {(1e-4, 1e-4)}


def test_keep_optimizer_leaves_the_schedule_alone():
    cfg, old = swap(FCN, keep_optimizer=True), load(FCN)
    assert cfg.optim_wrapper == old.optim_wrapper and cfg.param_scheduler == old.param_scheduler


def test_layer_decay_of_another_backbone_is_dropped():
    cfg = swap("mmseg::beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py", "dinat_mini")
    assert "constructor" not in cfg.optim_wrapper and "neck" not in cfg.model
    assert cfg.model.backbone.dilations == "ade20k-640"
    assert parameter_groups(cfg)["backbone.levels.0.blocks.0.attn.rpb"][1] == 0


def test_images_are_normalized_for_the_published_weights():
    caffe = "mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py"
    preprocessor = swap(caffe).model.data_preprocessor
    assert preprocessor.mean == list(zoo.IMAGENET_MEAN) and preprocessor.std == list(zoo.IMAGENET_STD)
    assert preprocessor.bgr_to_rgb
    assert swap(caffe, checkpoint="none").model.data_preprocessor == load(caffe).model.data_preprocessor


def test_options_and_their_mistakes():
    backbone = swap(RETINANET, checkpoint="weights.pth", dilations="imagenet-224").model.backbone
    assert (backbone.init_cfg.checkpoint, backbone.dilations) == ("weights.pth", "imagenet-224")
    assert "dilations" not in swap(RETINANET, "nat_small").model.backbone
    assert "init_cfg" not in swap(RETINANET, checkpoint="none").model.backbone
    with pytest.raises(ValueError, match="dinat_tiny"):
        swap(RETINANET, "dinat_tinny")
    with pytest.raises(ValueError, match="coco"):
        swap(RETINANET, dilations="cocoo")


def test_checkpoints_of_the_whole_old_model_are_dropped():
    cfg = load(RETINANET)
    cfg.load_from = "retinanet_r50.pth"
    cfg.model.init_cfg = dict(type="Pretrained", checkpoint="retinanet_r50.pth")
    swapped = with_backbone(cfg, "dinat_mini")
    assert swapped.load_from is None and "init_cfg" not in swapped.model
    assert any(line.startswith("load_from: 'retinanet_r50.pth' -> None") for line in changes(cfg, swapped))


@pytest.mark.parametrize("ready", PAIRS)
def test_ready_configs_are_what_the_swap_makes(ready):
    cfg, expected = Config.fromfile(READY / ready), swap(PAIRS[ready])
    assert comparable(cfg.model.to_dict()) == comparable(expected.model.to_dict())
    if "rtmdet" in ready:  # 16 images a step instead of 256
        assert cfg.optim_wrapper.optimizer.pop("lr") == 1e-4
        assert cfg.optim_wrapper.optimizer.pop("betas") == (0.9, 0.999)
        del expected.optim_wrapper.optimizer["lr"]
    assert comparable(cfg.optim_wrapper.to_dict()) == comparable(expected.optim_wrapper.to_dict())
    if "12e" not in ready or "dino" in ready:
        schedulers = zip(comparable(cfg.param_scheduler), comparable(expected.param_scheduler), strict=True)
        for got, wanted in schedulers:
            assert got.pop("eta_min", 0) == pytest.approx(wanted.pop("eta_min", 0)) and got == wanted
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device("meta"):
        assert type(MODELS.build(cfg.model.backbone)).__name__ == "DiNAT"


def test_every_ready_config_is_tested():
    assert {str(path.relative_to(READY)) for path in READY.glob("mm*/*.py")} == set(PAIRS)


def run(*arguments, cwd):
    command = [sys.executable, "-m", "dinat_backbones", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


def test_dinat_config_writes_a_config_of_its_own(tmp_path):
    out = tmp_path / "new" / "retinanet_dinat.py"
    done = run("config", RETINANET, "--backbone", "dinat_mini", "--out", out, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in ("model.neck.start_level: 1 -> 0", "model.neck.in_channels: [256, 512, 1024, 2048] -> [128, 256, 512]"):
        assert line in done.stdout
    assert "_base_ =" not in out.read_text()
    expected = swap(RETINANET, "dinat_mini")
    assert comparable(Config.fromfile(out).to_dict()) == comparable(expected.to_dict())


@pytest.mark.parametrize(
    "name, reason",
    [("mmdet::ssd/ssd300_coco.py", "SSDNeck"), ("mmdet::ssd/none.py", "mmdet::ssd/none.py is not there")],
)
def test_dinat_config_says_why_not(tmp_path, command, name, reason):
    message = command("config", name, "--backbone", "dinat_mini", "--out", "x.py")
    assert message.startswith("dinat config: ") and reason in message and "\n" not in message
    assert not (tmp_path / "x.py").exists()


def test_flops_counts_a_swapped_detector(command, capsys):
    assert command("flops", RETINANET, "--backbone", "dinat_mini") is None
    name, size, *figures = capsys.readouterr().out.splitlines()[-1].split()
    assert (name, size) == ("retinanet_r50_fpn_1x_coco_dinat_mini", "1280x800")
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        model = MODELS.build(swap(RETINANET, "dinat_mini").model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert float(figures[0].rstrip("M")) == pytest.approx(parameters / 1e6, abs=0.005)
    # published: 225 G with the heads of Mask R-CNN; the heads of RetinaNet take more than half of it
    assert 150 < float(figures[-1]) < 225
