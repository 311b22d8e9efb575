"""The backbones against the original code's outputs and gradients (golden arrays), and their behaviour as backbones."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dinat_backbones import NAT, DiNAT, DiNAT_s, layers, zoo
from helpers import EVERYWHERE, GOLDEN, PUBLISHED, assert_near, fill_by_name, load_golden, published_state

FAMILIES = dict(NAT=NAT, DiNAT=DiNAT, DiNAT_s=DiNAT_s)
NETS = sorted(path.stem for path in GOLDEN.glob("net_*.npz"))
SMALL = dict(embed_dim=16, depths=[1, 2], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3, drop_path_rate=0.0)


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
        monkeypatch.setattr(layers, "LARGE_BYTES", large)
        monkeypatch.setattr(layers, "PIECE_BYTES", size)
        with torch.no_grad():
            assert_near(model(image), whole)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("pieces", [True, False])
def test_hooks_see_every_map_once_and_keep_it(monkeypatch, gradients, pieces):
    """Inputs and outputs of each module of a block, `[B, H, W, C]`, as they were after the call that made them."""
    monkeypatch.setattr(layers, "LARGE_BYTES", 0 if pieces else 1 << 40)
    monkeypatch.setattr(layers, "PIECE_BYTES", 1000)
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


@pytest.mark.parametrize("gradients", [True, False])
def test_hooked_or_replaced_layers_of_the_mlp_see_whole_maps(monkeypatch, gradients):
    monkeypatch.setattr(layers, "LARGE_BYTES", 0)
    monkeypatch.setattr(layers, "PIECE_BYTES", 1)
    x, shapes = torch.randn(2, 5, 7, 16), []

    def hook(module, inputs, *output):
        shapes.append(tuple(inputs[0].shape))

    class Recorder(torch.nn.Linear):
        def forward(self, x):
            shapes.append(tuple(x.shape))
            return super().forward(x)

    def replace(mlp):
        mlp.fc1 = Recorder(16, 32)

    watch = [
        (lambda mlp: mlp.fc1.register_forward_hook(hook), [(2, 5, 7, 16)]),
        (lambda mlp: mlp.fc2.register_forward_pre_hook(hook), [(2, 5, 7, 32)]),
        (lambda mlp: mlp.drop.register_forward_hook(hook), [(2, 5, 7, 32), (2, 5, 7, 16)]),
        (replace, [(2, 5, 7, 16)]),
    ]
    for start, expected in watch:
        mlp = layers.Mlp(16, 32, drop=0.0).eval()
        start(mlp)
        with torch.set_grad_enabled(gradients):
            assert mlp(x).shape == x.shape
        assert shapes == expected
        shapes.clear()
    mlp = layers.Mlp(16, 32, drop=0.0).eval()
    handle = torch.nn.modules.module.register_module_forward_hook(hook)  # of all modules
    try:
        with torch.set_grad_enabled(gradients):
            mlp(x)
    finally:
        handle.remove()
    assert set(shapes) == {(2, 5, 7, 16), (2, 5, 7, 32)}


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


def test_layer_scale():
    with torch.device("meta"):
        assert "levels.0.blocks.0.gamma1" in NAT(arch="nat_small").state_dict()
        assert "levels.0.blocks.0.gamma1" not in DiNAT(arch="dinat_small", dilations="coco").state_dict()
    assert torch.equal(NAT(**SMALL, layer_scale=0.5).levels[0].blocks[0].gamma2, torch.full((16,), 0.5))


def test_compile_fullgraph():
    model, x = fill_by_name(DiNAT(**SMALL, dilations=[[2], [1, 2]])).eval(), torch.randn(1, 3, 33, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), model(x))


@pytest.mark.parametrize("family, with_cp", [(DiNAT, False), (DiNAT_s, True)])
def test_one_graph_for_all_sizes(family, with_cp):
    """dynamic=True: maps larger and smaller than kernel size x dilation, along either axis, share one graph."""
    testing = pytest.importorskip("torch._dynamo.testing")
    if torch.__version__ < "2.7":
        pytest.skip(f"torch {torch.__version__} compiles per size: its dynamic shapes are younger")
    torch.compiler.reset()
    small = SMALL | dict(depths=[1, 1], dilations=[[7], [5]], drop_path_rate=0.0)
    model = fill_by_name(family(**small, with_cp=with_cp)).train()
    counter = testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for height, width in ((97, 131), (60, 160), (193, 50), (70, 71)):
        x = torch.randn(5, 3, height, width)  # torch itself branches on the size of smaller convolutions
        results = []
        for network in (compiled, model):
            outs = network(x)
            gradients = torch.autograd.grad(sum(out.square().mean() for out in outs), tuple(model.parameters()))
            results.append([*outs, *gradients])
        assert_near(*results)
        compilations.append(counter.frame_count)
    assert compilations == compilations[:1] * 4


def test_inductor_trains_convolutions_at_open_sizes():
    if torch.__version__ < "2.7":
        pytest.skip(f"torch {torch.__version__} compiles per size: its dynamic shapes are younger")
    torch.compiler.reset()
    tokenizer = layers.ConvTokenizer(3, 8, torch.nn.LayerNorm)
    model = torch.nn.Sequential(tokenizer, layers.ConvDownsampler(8, torch.nn.LayerNorm))
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for height, width in ((99, 114), (86, 125)):
        x = torch.randn(2, 3, height, width)
        results = []
        for function in (compiled, model):
            out = function(x)
            results.append([out, *torch.autograd.grad(out.exp().mean(), tuple(model.parameters()))])
        assert_near(*results)


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


# ---- linear layers of inference on a CPU


@pytest.fixture
def fused(monkeypatch):
    """Calls of oneDNN's linear layer: what follows each."""
    if layers._LINEAR_POINTWISE is None:
        pytest.skip("this machine or build of torch has no linear layer of oneDNN")
    calls, function = [], layers._LINEAR_POINTWISE

    def counted(x, weight, bias, after, *others):
        calls.append(after)
        return function(x, weight, bias, after, *others)

    monkeypatch.setattr(layers, "_LINEAR_POINTWISE", counted)
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 7, 24), (1, 24), (3, 24)])
def test_fused_linear(fused, shape, gelu, bias):
    layer, x = torch.nn.Linear(24, 40, bias=bias), 2 * torch.randn(shape)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    expected = torch.nn.functional.gelu(expected) if gelu else expected
    with torch.no_grad():
        assert_near([layers.linear(layer, x, gelu=gelu)], [expected], 1e-6)
        assert fused == ["gelu" if gelu else "none"]
        assert_near(
            [layers.linear(layer, x.transpose(0, -2).contiguous().transpose(0, -2), gelu=gelu)], [expected], 1e-6
        )
        with torch.autocast("cpu", torch.bfloat16):
            half = layers.linear(layer, x, gelu=gelu)
        assert half.dtype == torch.bfloat16
        assert_near([half], [expected], 1e-2)
    assert not layers.linear(layer, x[:0], gelu=gelu).numel()


def test_model_fuses_all_its_linear_layers(fused):
    model, image = DiNAT(**SMALL).eval(), torch.randn(1, 3, 40, 50)
    expected = [out.detach() for out in model(image)]
    assert not fused  # gradients are on
    with torch.inference_mode():
        assert_near(model(image), expected)
    blocks = sum(SMALL["depths"])
    assert sorted(fused) == sorted(["none", "none", "gelu", "none"] * blocks)


def test_what_watches_a_linear_layer_is_not_passed_over(fused):
    layer, x, seen = torch.nn.Linear(8, 8), torch.randn(4, 8), []

    class Other(torch.nn.Linear):
        pass

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(8, 8)

        def forward(self, x):
            return layers.linear(self.layer, x, gelu=True)

    with torch.no_grad():
        handle = layer.register_forward_hook(lambda *call: seen.append(call))
        layers.linear(layer, x)
        handle.remove()
        layers.linear(Other(8, 8), x)
        layers.linear(layer.double(), x.double())
        torch.vmap(lambda row: layers.linear(layer, row))(x.double())
        torch.func.jvp(lambda row: layers.linear(layer, row), (x.double(),), (x.double(),))
        assert "gelu" in str(torch.jit.trace(Net(), x, check_trace=False).graph)
        assert "gelu" in torch.fx.symbolic_trace(Net()).code
    layers.linear(layer.float(), x).sum().backward()
    assert len(seen) == 1 and layer.weight.grad is not None
    assert not fused


def test_what_onednn_would_not_check_goes_to_torch(fused, monkeypatch):
    layer, x = torch.nn.Linear(8, 8), torch.randn(4, 8)
    strided, expanded, scalar, meta = (torch.nn.Linear(8, 8) for _ in range(4))
    strided.bias = torch.nn.Parameter(torch.randn(16)[::2])
    expanded.bias = torch.nn.Parameter(torch.randn(1).expand(8))
    scalar.bias = torch.nn.Parameter(torch.randn(1))
    with torch.no_grad():
        for module in (strided, expanded, scalar):
            assert torch.equal(layers.linear(module, x), module(x))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layers.linear(layer, x[:, :7])
        with pytest.raises((RuntimeError, NotImplementedError)):
            layers.linear(meta.to("meta"), x)
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
            layers.linear(layer, x.long())
        with torch.backends.mkldnn.flags(enabled=False):
            layers.linear(layer, x)
        with torch.device("cpu"):  # a mode that sees functions of torch
            layers.linear(layer, x)
        monkeypatch.setattr(layer, "forward", lambda x: "replaced", raising=False)
        assert layers.linear(layer, x) == "replaced"
    assert not fused


def test_counters_of_flops_see_fused_layers():
    model, image = DiNAT(**SMALL).eval(), torch.randn(1, 3, 40, 50)
    counts = []
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counter:
            model(image)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
