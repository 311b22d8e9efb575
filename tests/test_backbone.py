"""The backbones against the original code's outputs and gradients (golden arrays), and their behaviour as backbones."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinat_backbones import NAT, DiNAT, DiNAT_s, NeighborhoodAttention2D, layers, mlp, zoo
from helpers import EVERYWHERE, GOLDEN, PUBLISHED, SMALL, assert_near, fill_by_name, load_golden, published_state

FAMILIES = dict(NAT=NAT, DiNAT=DiNAT, DiNAT_s=DiNAT_s)
NETS = sorted(path.stem for path in GOLDEN.glob("net_*.npz"))


def golden_model(meta, **kwargs):
    return fill_by_name(FAMILIES[meta["cls"]](**meta["kwargs"], **kwargs)).eval()


def golden_input(meta):
    return torch.randn(meta["shape"], generator=torch.Generator().manual_seed(meta["seed"]))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("backend", EVERYWHERE)
def test_golden(name, backend):
    """Features, loss and gradients of the original code with natten 0.14.6, padded stages included."""
    meta, arrays = load_golden(name)
    model, x = golden_model(meta, backend=backend), golden_input(meta).requires_grad_()
    outs = model(x)
    loss = sum(out.square().mean() for out in outs)
    loss.backward()
    for i, out in enumerate(outs):
        assert out.is_contiguous()
        assert list(out.shape) == arrays[f"out{i}_shape"].tolist()
        assert_near([out.detach().flatten()[:: int(arrays[f"out{i}_step"])]], [torch.tensor(arrays[f"out{i}"])], 1e-4)
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-4)
    assert_near([x.grad.flatten()[:: int(arrays["grad_input_step"])]], [torch.tensor(arrays["grad_input"])], 1e-4)
    parameters = dict(model.named_parameters())
    tables = [key.removeprefix("grad_") for key in arrays if key.endswith("rpb")]
    assert sorted(tables) == sorted(n for n in parameters if n.endswith("rpb"))  # the published names
    for table in tables:
        assert_near([parameters[table].grad], [torch.tensor(arrays[f"grad_{table}"])], 1e-4)


@pytest.mark.parametrize("name", list(zoo.ARCHS))
def test_published_names_and_shapes(name):
    arch = zoo.ARCHS[name]
    with torch.device("meta"):
        model = FAMILIES[arch.family](arch=name, dilations=None if arch.family == "NAT" else "coco")
    got = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    values = (arch.embed_dim, arch.depths, arch.num_heads, arch.mlp_ratio, arch.layer_scale)
    assert got == published_state(arch.family, *values)


@pytest.mark.parametrize("row", [*zoo.DETECTION.values(), *zoo.SEGMENTATION.values()], ids=lambda row: row.name)
def test_arch_and_setting_equal_the_written_out_arguments(row):
    """`arch=`, `dilations=` name the same backbone as the plain keyword arguments of the published config."""
    table = PUBLISHED["detection" if isinstance(row, zoo.Detection) else "segmentation"]
    arguments = dict(table[f"{row.family.lower()}/{row.name}"]["backbone"])
    family = FAMILIES[arguments.pop("type")]
    with torch.device("meta"):
        named = family(arch=row.arch, dilations=row.dilations, drop_path_rate=arguments["drop_path_rate"])
        written = family(**arguments)
    assert named.dilations == written.dilations
    assert str(named) == str(written)
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in written.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 70), (5, 3), (33, 64), (50, 47)])
def test_any_size(family, height, width):
    model = FAMILIES[family](**SMALL, dilations=None if family == "NAT" else [[4], [1, 2]]).eval()
    outs = model(torch.randn(2, 3, height, width))
    assert model.out_channels == (16, 32)
    assert model.out_strides == (4, 8)
    for out, channels, stride in zip(outs, model.out_channels, model.out_strides, strict=True):
        assert out.shape == (2, channels, -(-height // stride), -(-width // stride))
        assert out.isfinite().all()


def test_out_indices():
    model = NAT(**SMALL, out_indices=[1]).eval()
    assert "norm0.weight" not in model.state_dict()
    (out,) = model(torch.randn(1, 3, 32, 32))
    assert out.shape[1:] == (32, 4, 4)


def test_inference_in_pieces_changes_nothing(monkeypatch):
    model, image = DiNAT(**SMALL, layer_scale=0.5).eval(), torch.randn(2, 3, 40, 50)
    whole = [out.detach() for out in model(image)]  # gradients are on
    # single pixels; a last piece of another size; no pieces
    for large, size in ((0, 1), (0, 5000), (1 << 40, 1)):
        monkeypatch.setattr(mlp, "LARGE_BYTES", large)
        monkeypatch.setattr(mlp, "PIECE_BYTES", size)
        with torch.no_grad():
            assert_near(model(image), whole)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_hooks_see_every_map_once_and_keep_it(monkeypatch, gradients, pieces):
    """Inputs and outputs of each module of a block, `[B, H, W, C]`, as they were after the call that made them."""
    monkeypatch.setattr(mlp, "LARGE_BYTES", 0 if pieces else 1 << 40)
    monkeypatch.setattr(mlp, "PIECE_BYTES", 1000)
    model, kept = DiNAT(**SMALL, layer_scale=0.5).eval(), []
    names = {f"blocks.{i}.{name}" for i in (0, 1) for name in ("norm1", "attn", "norm2", "mlp")}

    def keep(name):
        def hook(module, inputs, output):
            tensors = (*inputs, output)
            kept.append((name, tensors, [tensor.detach().clone() for tensor in tensors]))

        return hook

    for name in names:
        model.levels[1].get_submodule(name).register_forward_hook(keep(name))
    with torch.set_grad_enabled(gradients):
        outs = model(torch.randn(2, 3, 40, 50))
    assert sorted(name for name, _, _ in kept) == sorted(names)
    for name, tensors, copies in kept:
        assert [tuple(tensor.shape) for tensor in tensors] == [(2, 5, 7, 32)] * 2, name
        assert all(map(torch.equal, tensors, copies)), name
    assert all(out.isfinite().all() for out in outs)


@pytest.mark.parametrize("family", ["DiNAT", "DiNAT_s"])
@pytest.mark.parametrize("name", ["tiny", "large"])
def test_arch_needs_dilations(family, name):
    """With dilation 1 everywhere it would load a published file completely, and be wrong."""
    arch = f"{family.lower()}_{name}"
    with pytest.raises(ValueError) as caught:
        FAMILIES[family](arch=arch)
    message = str(caught.value)
    assert message.startswith(f"{family}(arch='{arch}') needs dilations=")
    published = [setting for setting in zoo.DILATION_SETTINGS.values() if family in setting.families]
    assert len(published) == {"DiNAT": 7, "DiNAT_s": 5}[family]
    for setting in published:  # what it is for, and its kernel size
        assert f"'{setting.name}' ({setting.task}, kernel size {setting.kernel_size})" in message
    with torch.device("meta"):  # the architecture's numbers without its name: as in the published code
        known = zoo.ARCHS[arch]
        numbers = dict(embed_dim=known.embed_dim, depths=known.depths, num_heads=known.num_heads, mlp_ratio=2.0)
        assert {d for stage in FAMILIES[family](**numbers).dilations for d in stage} == {1}


def test_setting_brings_its_kernel_size():
    with torch.device("meta"):
        model = DiNAT(arch="dinat_large", dilations="mask2former")
        assert model.kernel_size == model.levels[0].blocks[0].attn.kernel_size == 11
        assert DiNAT(arch="dinat_large", dilations="mask2former", kernel_size=11).kernel_size == 11
        assert DiNAT(arch="dinat_large", dilations="coco").kernel_size == 7
        written = DiNAT(arch="dinat_large", dilations=model.dilations, kernel_size=5)
        assert (written.kernel_size, written.dilations) == (5, model.dilations)
    for setting, given, own in (("mask2former", 7, 11), ("coco", 11, 7)):
        with pytest.raises(ValueError, match=f"kernel_size={given} contradicts dilations='{setting}'.* {own}: "):
            DiNAT(arch="dinat_large", dilations=setting, kernel_size=given)


def test_nat_has_dilation_1():
    with torch.device("meta"):
        assert NAT(arch="nat_mini", dilations=[[1] * 3, [1] * 4, [1] * 6, [1] * 5]).dilations[0] == (1, 1, 1)
    with pytest.raises(ValueError, match="arch='nat_mini' with dilations='coco': NAT has dilation 1 everywhere"):
        NAT(arch="nat_mini", dilations="coco")
    with pytest.raises(ValueError, match=r"dilations=\[\[1\], \[1, 2\]\]: NAT has dilation 1 everywhere; use DiNAT"):
        NAT(**SMALL, dilations=[[1], [1, 2]])


def test_memory_format_does_not_matter():
    model, x = DiNAT(**SMALL).eval(), torch.randn(2, 3, 40, 50)
    for a, b in zip(model(x), model(x.to(memory_format=torch.channels_last)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
def test_freezing(family, frozen):
    model = FAMILIES[family](**SMALL | dict(drop_path_rate=0.5), drop_rate=0.3, frozen_stages=frozen).train()
    stage = "layers" if family == "DiNAT_s" else "levels"

    def is_frozen(name):
        if name.startswith("patch_embed"):
            return frozen >= 0
        index = int(name.removeprefix("norm").removeprefix(f"{stage}.")[0])
        return index < frozen

    out = model(torch.randn(1, 3, 32, 32))[-1].square().sum()
    assert out.requires_grad == (frozen < 2)
    if out.requires_grad:
        out.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != is_frozen(name), name
        assert (parameter.grad is None) or not is_frozen(name), name
    stages = getattr(model, stage)
    assert [s.training for s in stages] == [i >= frozen for i in range(2)]
    assert model.patch_embed.training == (frozen < 0)
    if frozen == 2:  # nothing random is left
        x = torch.randn(1, 3, 32, 32)
        assert torch.equal(model(x)[-1], model(x)[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_changes_nothing(family):
    results = []
    for with_cp in (False, True):
        model = fill_by_name(FAMILIES[family](**SMALL, with_cp=with_cp)).train()
        x = torch.randn(2, 3, 40, 36, generator=torch.Generator().manual_seed(1), requires_grad=True)
        sum(out.square().mean() for out in model(x)).backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    assert_near(*results)


def test_stochastic_depth_rises_linearly():
    model = DiNAT(**SMALL | dict(depths=[2, 3], drop_path_rate=0.4))
    rates = [block.drop_path.p for level in model.levels for block in level.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_stochastic_depth_drops_samples_and_keeps_the_mean():
    drop = layers.DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3, 1))
    kept = out[:, 0, 0, 0] != 0
    assert torch.equal(out, kept[:, None, None, None] / 0.75 * torch.ones(4000, 2, 3, 1))
    assert abs(kept.float().mean() - 0.75) < 0.03


class SeesBatches(torch.nn.LayerNorm):
    """A layer of another type, which might depend on the whole batch."""

    batches: list = []

    def forward(self, x):
        self.batches.append(len(x))
        return super().forward(x)


def training_step(model, x, seed):
    """Outputs, the gradient of the images and those of all parameters."""
    torch.manual_seed(seed)
    outs = model(x)
    loss = sum(out.square().mean() for out in outs)
    return [*outs, *torch.autograd.grad(loss, [x, *model.parameters()])]


@pytest.mark.parametrize("p, batch", [(0.5, 4), (0.9, 2), (0.1, 3)])
@pytest.mark.parametrize("with_cp", [False, True])
def test_dropped_samples_cost_nothing(monkeypatch, p, batch, with_cp):
    """The same random numbers give the same results, whether branches are computed for all samples or not."""
    model = fill_by_name(DiNAT(**SMALL, layer_scale=0.5, with_cp=with_cp)).train()
    for stage in model.levels:
        for block in stage.blocks:
            block.drop_path.p = p
    x, seen, linear_of_gelu = torch.randn(batch, 3, 40, 36, requires_grad=True), [], mlp.linear_of_gelu

    def counted(layer, hidden):
        seen.append(len(hidden))
        return linear_of_gelu(layer, hidden)

    monkeypatch.setattr(mlp, "linear_of_gelu", counted)
    skipping = [training_step(model, x, seed) for seed in range(6)]
    assert 1 <= min(seen) < batch
    monkeypatch.setattr(layers.Block, "_can_skip", lambda self, x: False)
    seen.clear()
    for seed, got in enumerate(skipping):
        assert_near(got, training_step(model, x, seed), 2e-5)
    assert set(seen) == {batch}


def test_a_branch_that_all_samples_drop_has_gradients_of_zero():
    """None would stop the optimizer's momentum and weight decay, and DistributedDataParallel would wait for it."""
    model, x = DiNAT(**SMALL).train(), torch.randn(2, 3, 40, 36)
    block = model.levels[0].blocks[0]
    block.drop_path.p = 1 - 1e-9
    sum(out.square().mean() for out in model(x)).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in block.parameters())
    assert model.levels[0].downsample.reduction.weight.grad.abs().sum() > 0


def test_who_watches_a_block_sees_whole_batches():
    x, seen = torch.randn(3, 20, 20, 16), []
    options = dict(dim=16, mlp_ratio=2.0, drop=0.0, drop_path=0.5, layer_scale=None)

    def block(norm=torch.nn.LayerNorm):
        return layers.Block(norm_layer=norm, attention=NeighborhoodAttention2D(16, 2, 3), **options).train()

    def hook(module, inputs, *_):
        seen.append(len(inputs[0]))

    hooked = block()
    hooked.mlp.fc1.register_forward_hook(hook)
    backward_hooked = block()
    backward_hooked.norm2.register_full_backward_hook(lambda module, _, grad: seen.append(len(grad[0])))
    replaced = block()
    inner = replaced.attn.forward
    replaced.attn.forward = lambda x: (seen.append(len(x)), inner(x))[1]
    SeesBatches.batches = seen
    for module, calls in ((hooked, 1), (backward_hooked, 1), (replaced, 1), (block(SeesBatches), 2)):
        for seed in range(4):
            torch.manual_seed(seed)
            module(x.clone().requires_grad_()).sum().backward()
        assert seen == [3] * 4 * calls
        seen.clear()
    counter = FlopCounterMode(display=False)
    for seed in range(4):
        torch.manual_seed(seed)
        with counter:
            block()(x)
        seen.append(counter.get_total_flops())
    assert len(set(seen)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_skipping_keeps_dtypes(dtype):
    model = DiNAT(**SMALL | dict(drop_path_rate=0.5)).train().to(dtype)
    assert {out.dtype for out in model(torch.randn(4, 3, 40, 36, dtype=dtype))} == {dtype}
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        whole = DiNAT(**SMALL).train()(torch.randn(4, 3, 40, 36))
        assert [out.dtype for out in model(torch.randn(4, 3, 40, 36))] == [out.dtype for out in whole]


def test_layer_scale():
    with torch.device("meta"):
        assert "levels.0.blocks.0.gamma1" in NAT(arch="nat_small").state_dict()
        assert "levels.0.blocks.0.gamma1" not in DiNAT(arch="dinat_small", dilations="coco").state_dict()
    assert torch.equal(NAT(**SMALL, layer_scale=0.5).levels[0].blocks[0].gamma2, torch.full((16,), 0.5))


def test_bfloat16_autocast():
    model, x = fill_by_name(DiNAT(**SMALL, dilations=[[4], [1, 2]])).train(), torch.randn(2, 3, 64, 65)
    with torch.autocast("cpu", torch.bfloat16):
        outs = model(x)
    sum(out.float().square().mean() for out in outs).backward()
    for out, exact in zip(outs, model(x), strict=True):
        assert (out - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "family, arguments, message",
    [
        (DiNAT, dict(arch="dinat_huge"), "'dinat_huge'.*dinat_large"),
        (DiNAT, dict(arch="nat_mini"), r"'nat_mini' belongs to NAT, not to DiNAT; use NAT\(arch=...\)"),
        (DiNAT, dict(arch="dinat_mini", dilations="coco", depths=[1, 1]), "'coco' is for 4 stages, but depths="),
        (DiNAT, dict(**SMALL | dict(drop_path_rate=1.0)), "drop_path_rate=1.0: expected at least 0 and less than 1"),
        (NAT, {}, "NAT needs embed_dim=... or arch=..., one of .*nat_mini"),
        (DiNAT, dict(arch="dinat_mini", dilations="cocoa"), "'cocoa'.*coco"),
        (DiNAT, dict(**SMALL, dilations="coco"), "needs arch="),
        (
            DiNAT,
            dict(**SMALL, dilations=[[1], [1]]),
            r"\[1, 1\] entries per stage; expected one per block, depths=\[1, 2\]",
        ),
        (DiNAT, dict(**SMALL, dilations=[[1]]), "entries per stage"),
        (DiNAT, dict(**SMALL | dict(num_heads=[1, 3])), "dim=32 is not a multiple of num_heads=3"),
        (DiNAT, dict(**SMALL | dict(num_heads=[1])), r"num_heads=\[1\] and depths=\[1, 2\]"),
        (DiNAT, dict(**SMALL | dict(kernel_size=6)), "kernel_size=6"),
        (DiNAT, dict(**SMALL, out_indices=[2]), r"out_indices=\[2\]: expected stages 0 to 1"),
        (DiNAT, dict(**SMALL, frozen_stages=3), "frozen_stages=3"),
    ],
)
def test_bad_arguments(family, arguments, message):
    with pytest.raises(ValueError, match=message):
        family(**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_training_under_autocast_stays_finite(dtype):
    """200 steps with AdamW, gradients scaled as for half precision; the maps are smaller than kernel times dilation."""
    torch.manual_seed(0)
    model = DiNAT(**SMALL | dict(dilations=[[3], [1, 2]], layer_scale=0.5))
    head = torch.nn.Linear(32, 4)
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses, scale = [], 1024.0
    for _ in range(200):
        with torch.autocast("cpu", dtype):
            logits = head(model(images)[-1].mean((2, 3)))
            loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        (loss * scale).backward()
        for parameter in parameters:
            if parameter.grad is not None:  # the norm of a map that the head does not see has none
                assert parameter.grad.isfinite().all()
                parameter.grad /= scale
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:10])
