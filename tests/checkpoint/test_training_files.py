"""Checkpoints that training programs save themselves: two iterations, then the file is read and loaded. The recipes of
the shipped configs are in tests/configs/test_recipes.py."""

import argparse
import datetime
import enum
import inspect
import logging
import pathlib
import random
from collections import Counter, defaultdict, deque

import numpy
import pytest
import torch
from torch import nn

from dinat_backbones import DiNAT
from dinat_backbones.checkpoint import Inert, load_backbone, load_model, read

SMALL = dict(embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 4], kernel_size=3, mlp_ratio=1.0)


def equal(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def loads_into_backbone(path, expected):
    """Whether a new backbone has these weights after loading the file."""
    model = DiNAT(**SMALL)
    report = load_backbone(model, path)
    assert report.complete
    return equal(model.state_dict(), expected)


# ------------------------------------------------------------------------------------------------------------ mmengine

mmengine = pytest.importorskip("mmengine", reason="mmengine is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
import dinat_backbones.adapters.openmmlab  # noqa: E402, F401, I001  # finds mmcv's operators
import mmdet.engine  # noqa: E402, F401  # registers schedulers and hooks
import mmseg.engine  # noqa: E402, F401
from mmengine.model import BaseModel  # noqa: E402
from mmengine.registry import PARAM_SCHEDULERS  # noqa: E402
from mmengine.runner import Runner  # noqa: E402


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = DiNAT(**SMALL)

    def forward(self, inputs, mode="tensor"):
        return {"loss": sum(out.square().mean() for out in self.backbone(inputs[None]))}


class Images(torch.utils.data.Dataset):
    metainfo = dict(classes=("square", "circle"), palette=numpy.array([[0, 0, 255], [255, 0, 0]]))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return torch.full((3, 32, 32), float(index + 1))


def train(folder, **parts):
    """A runner after two iterations, whose checkpoint is `folder`/iter_2.pth."""
    torch.manual_seed(0)
    parts = dict(optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=0.1))) | parts
    parts.setdefault("default_hooks", {}).update(checkpoint=dict(type="CheckpointHook", interval=2, by_epoch=False))
    runner = Runner(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=dict(batch_size=1, dataset=Images(), sampler=dict(type="DefaultSampler", shuffle=False)),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        experiment_name=folder.name,
        log_level="ERROR",
        **parts,
    )
    runner.train()
    return runner


# Arguments of the schedulers, each given to those that know it.
ARGUMENTS = dict(
    param_name="lr",
    **dict(begin=0, end=4, by_epoch=False, gamma=0.5, step_size=1, milestones=[1, 3], T_max=4, eta_min=0.0),
    **dict(periods=[2, 2], restart_weights=[1, 0.5], eta_max=0.2, total_steps=4, monitor="loss"),
)


@pytest.mark.parametrize("name", sorted(PARAM_SCHEDULERS.module_dict))
def test_every_scheduler_of_mmengine(tmp_path, name):
    kind = PARAM_SCHEDULERS.get(name)
    inits = [base.__init__ for base in kind.__mro__[:-1]]
    known = {parameter for init in inits for parameter in inspect.signature(init).parameters}
    given = {key: value for key, value in ARGUMENTS.items() if key in known}
    if not any("param_name" in inspect.signature(base.__init__).parameters for base in kind.__mro__[:1]):
        given.pop("param_name", None)
    given["by_epoch"] = "Plateau" in name
    runner = train(tmp_path / name, param_scheduler=[dict(type=name, **given)])
    found = read(tmp_path / name / "iter_2.pth")
    expected = runner.param_schedulers[0].state_dict()
    assert found["meta"]["iter"] == 2 and found["param_schedulers"][0].keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, (int, float, str, list, Counter)):
            got = found["param_schedulers"][0][key]
            assert type(got) is type(value) and (got == value or given["by_epoch"]), key  # an epoch ends after saving
    assert loads_into_backbone(tmp_path / name / "iter_2.pth", runner.model.backbone.state_dict())


@pytest.mark.parametrize(
    "average", ["ExponentialMovingAverage", "MomentumAnnealingEMA", "StochasticWeightAverage", "mmdet.ExpMomentumEMA"]
)
def test_averages_of_mmengine_are_loaded_and_reported(tmp_path, caplog, average):
    hook = dict(type="EMAHook", ema_type=average, update_buffers=True)
    runner = train(tmp_path / "run", custom_hooks=[hook])
    averaged = next(hook.ema_model for hook in runner.hooks if type(hook).__name__ == "EMAHook").module
    assert not equal(averaged.state_dict(), runner.model.state_dict())
    model = Model()
    with caplog.at_level(logging.INFO):
        report = load_model(model, tmp_path / "run" / "iter_2.pth")
    assert equal(model.state_dict(), averaged.state_dict()) and report.ema == "state_dict"
    assert "moving average (EMA) that the file has under state_dict" in caplog.text
    assert loads_into_backbone(tmp_path / "run" / "iter_2.pth", averaged.backbone.state_dict())


# ---------------------------------------------------------------------------------------------------------------- timm


def test_saver_of_timm(tmp_path, caplog):
    utils = pytest.importorskip("timm.utils", reason="timm is not installed: pip install 'dinat_backbones[timm]'")
    from timm.scheduler import CosineLRScheduler

    model = DiNAT(**SMALL)
    average = utils.ModelEmaV2(model, decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = CosineLRScheduler(optimizer, t_initial=3)
    args = argparse.Namespace(
        model="dinat", data_dir=pathlib.Path("images"), lr=0.1, started=datetime.datetime(2024, 1, 1)
    )
    scaler = utils.NativeScaler()
    saver = utils.CheckpointSaver(
        model, optimizer, args, model_ema=average, amp_scaler=scaler, checkpoint_dir=str(tmp_path), recovery_dir=""
    )
    for step in range(2):
        sum(out.square().mean() for out in model(torch.ones(1, 3, 32, 32))).backward()
        optimizer.step()
        average.update(model)
        scheduler.step(step)
    saver.save_checkpoint(0, metric=numpy.float64(0.5))
    path = tmp_path / "checkpoint-0.pth.tar"
    assert read(path)["metric"] == 0.5 and read(path)["args"].name == "argparse.Namespace"
    with caplog.at_level(logging.INFO):
        assert loads_into_backbone(path, average.module.state_dict())
    assert "under state_dict_ema" in caplog.text and not equal(average.module.state_dict(), model.state_dict())


# ----------------------------------------------------------------------------------------------- transformers and torch


def test_schedulers_of_transformers(tmp_path):
    optimization = pytest.importorskip("transformers", reason="transformers is not installed").optimization
    for name in optimization.SchedulerType:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        more = dict(scheduler_specific_kwargs=dict(num_decay_steps=3)) if name == "warmup_stable_decay" else {}
        try:
            scheduler = optimization.get_scheduler(name, optimizer, 1, 4, **more)
        except (TypeError, ValueError, NotImplementedError):  # wants a model or more arguments of its own
            continue
        torch.save(scheduler.state_dict() | {"type": name}, tmp_path / "scheduler.pt")
        assert read(tmp_path / "scheduler.pt")["type"].arguments == (name.value,)


def test_random_states(tmp_path):
    """As transformers' Trainer saves them in rng_state.pth."""
    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        "generator": numpy.random.default_rng(0),
    }
    torch.save(states, tmp_path / "rng_state.pth")
    found = read(tmp_path / "rng_state.pth")
    assert found["python"] == states["python"] and torch.equal(found["cpu"], states["cpu"])
    assert (found["numpy"][1].numpy() == states["numpy"][1]).all() and isinstance(found["generator"], Inert)


def test_schedulers_of_torch(tmp_path):
    for name, kind in vars(torch.optim.lr_scheduler).items():
        if not (inspect.isclass(kind) and issubclass(kind, torch.optim.lr_scheduler.LRScheduler)) or name.startswith(
            "_"
        ):
            continue
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
        required = dict(
            **dict(
                lr_lambda=lambda step: 0.5,
                step_size=2,
                milestones=[1],
                gamma=0.5,
                T_max=3,
                T_0=3,
                base_lr=0.1,
                max_lr=0.2,
            ),
            **dict(total_steps=4, schedulers=[torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]),
        )
        signature = inspect.signature(kind).parameters
        if name == "LRScheduler":
            continue
        first = [optimizer] if next(iter(signature)) == "optimizer" else []
        scheduler = kind(*first, **{key: value for key, value in required.items() if key in signature})
        torch.save({"scheduler": scheduler.state_dict()}, tmp_path / "file.pth")
        assert read(tmp_path / "file.pth")["scheduler"].keys() == scheduler.state_dict().keys(), name


class Colour(enum.Enum):
    RED = "red"


def test_containers_of_the_standard_library(tmp_path):
    values = dict(
        counter=Counter({3: 2}),
        queue=deque([1, 2], maxlen=5),
        found=frozenset({1, "a"}),
        both={1, 2},
        raw=bytearray(b"abc"),
        number=1 + 2j,
        text=b"\xff",
    )
    for protocol in (2, 3, 4, 5):
        torch.save(values | {"lists": defaultdict(list, a=[1])}, tmp_path / "file.pth", pickle_protocol=protocol)
        found = read(tmp_path / "file.pth")
        assert found.pop("lists") == {"a": [1]} and found == values
        assert found["queue"].maxlen == 5 and all(type(found[key]) is type(value) for key, value in values.items())


# ----------------------------------------------------------------------------------------------------- Detectron2


def test_checkpointer_of_detectron2(tmp_path):
    pytest.importorskip("detectron2", reason="detectron2 is not installed: make setup-classic")
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.solver import LRMultiplier, WarmupParamScheduler
    from fvcore.common.param_scheduler import MultiStepParamScheduler

    model = nn.ModuleDict({"backbone": DiNAT(**SMALL)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    steps = WarmupParamScheduler(MultiStepParamScheduler([1, 0.1], milestones=[2, 4]), 0.1, 0.25)
    scheduler = LRMultiplier(optimizer, steps, max_iter=4)
    for _ in range(2):
        sum(out.square().mean() for out in model["backbone"](torch.ones(1, 3, 32, 32))).backward()
        optimizer.step()
        scheduler.step()
    scaler = torch.amp.GradScaler("cpu")
    saver = DetectionCheckpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler, grad_scaler=scaler)
    saver.save("file", iteration=2, metric=numpy.float32(0.5))
    found = read(tmp_path / "file.pth")
    assert found["iteration"] == 2 and found["scheduler"]["last_epoch"] == 2 and found["grad_scaler"]["scale"] > 0
    assert loads_into_backbone(tmp_path / "file.pth", model["backbone"].state_dict())


# -------------------------------------------------------------------------------------------------- names of wrappers


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module."])
def test_compiled_and_parallel_models(tmp_path, prefix):
    """`torch.compile(model)`, alone and inside or around DistributedDataParallel."""
    model = Model()
    torch.save(
        {"state_dict": {prefix + key: value for key, value in model.state_dict().items()}}, tmp_path / "file.pth"
    )
    other = Model()
    load_model(other, tmp_path / "file.pth")
    assert equal(other.state_dict(), model.state_dict())
    assert loads_into_backbone(tmp_path / "file.pth", model.backbone.state_dict())


def test_a_compiled_backbone_inside_a_model(tmp_path):
    model = Model()
    expected = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    model.backbone = torch.compile(model.backbone)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    assert any("backbone._orig_mod." in key for key in model.state_dict())
    assert loads_into_backbone(tmp_path / "file.pth", expected)


def test_an_averaged_model_of_torch(tmp_path):
    average = torch.optim.swa_utils.AveragedModel(Model())
    torch.save(average.state_dict(), tmp_path / "file.pth")
    other = Model()
    load_model(other, tmp_path / "file.pth")
    assert equal(other.state_dict(), average.module.state_dict())


def test_one_of_several_backbones_is_chosen_by_its_prefix(tmp_path):
    student, teacher = DiNAT(**SMALL).state_dict(), DiNAT(**SMALL).state_dict()
    both = {f"student.backbone.{key}": value for key, value in student.items()}
    both |= {f"teacher.backbone.{key}": value for key, value in teacher.items()}
    torch.save({"state_dict": both}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="2 backbones, under 'student.backbone.', 'teacher.backbone.'"):
        load_backbone(DiNAT(**SMALL), tmp_path / "file.pth")
    model = DiNAT(**SMALL)
    load_backbone(model, tmp_path / "file.pth", prefix="teacher.backbone")
    assert equal(model.state_dict(), teacher)
    torch.save({f"teacher.backbone.{key}": value for key, value in teacher.items()}, tmp_path / "one.pth")
    assert loads_into_backbone(tmp_path / "one.pth", teacher)
