"""adapters/mmcv_ext called through mmcv.ops, next to compiled mmcv where there is one and next to loops everywhere."""

import inspect
import re
import sys
import types

import mmcv_loops
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import assert_near

pytest.importorskip("mmcv", reason="mmcv is not installed: pip install 'dinat_backbones[openmmlab]'")

from mmcv_cases import ROUNDS, Case, assert_same, in_use, mmcv, not_compiled, operators, stand_in

from dinat_backbones.adapters import mmcv_ext

# Each draws a call: a function of the tensors that have gradients, these tensors, and the same in loops over numbers.


def roi_align(case):
    input, rois, bins = case.map(), case.rois(), case.bins()
    scale, ratio = case.choice(0.25, 0.5, 1.0), case.choice(0, 0, 1, 2)
    mode, aligned = case.choice("avg", "max"), case.choice(True, False)
    arguments = (rois, bins, scale, ratio, mode, aligned)
    return (
        lambda x: mmcv.ops.roi_align(x, *arguments),
        [input],
        lambda x: mmcv_loops.roi_align(x, rois.numpy(), bins, scale, ratio, mode, aligned),
    )


def roi_pool(case):
    input, rois, bins, scale = case.map(), case.rois(), case.bins(), case.choice(0.25, 0.5, 1.0)
    return (
        lambda x: mmcv.ops.roi_pool(x, rois, bins, scale),
        [input],
        lambda x: mmcv_loops.roi_pool(x, rois.numpy(), bins, scale),
    )


def precise_roi_pool(case):
    input, rois, bins, scale = case.map(), case.rois(), case.bins(), case.choice(0.25, 0.5, 1.0)

    class Pool(torch.autograd.Function):  # mmcv's own takes float32 only
        @staticmethod
        def forward(ctx, x, rois):
            output = x.new_zeros(len(rois), x.shape[1], *bins)
            sys.modules["mmcv.ops.prroi_pool"].ext_module.prroi_pool_forward(x, rois, output, *bins, scale)
            ctx.save_for_backward(x, rois, output)
            return output

        @staticmethod
        def backward(ctx, grad):
            x, rois, output = ctx.saved_tensors
            module, grads = sys.modules["mmcv.ops.prroi_pool"].ext_module, (torch.zeros_like(x), torch.zeros_like(rois))
            module.prroi_pool_backward(grad, rois, grads[0], *bins, scale)
            module.prroi_pool_coor_backward(output, grad, x, rois, grads[1], *bins, scale)
            return grads

    images = rois[:, :1]
    return (
        lambda x, corners: Pool.apply(x, torch.cat([images, corners], 1)),
        [input, rois[:, 1:]],
        lambda x, corners: mmcv_loops.precise_roi_pool(x, np.concatenate([images, corners], 1), bins, scale),
    )


def deform_roi_pool(case):
    input, rois, bins = case.map(least=3), case.rois(), case.bins()
    scale, ratio, gamma = case.choice(0.25, 0.5, 1.0), case.choice(0, 1, 2), 0.1
    offset = case.choice(case.normal(len(rois), 2, *bins), case.normal(0))
    return (
        lambda x, o: mmcv.ops.deform_roi_pool(x, rois, o, bins, scale, ratio, gamma),
        [input, offset],
        lambda x, o: mmcv_loops.roi_align(x, rois.numpy(), bins, scale, ratio, "avg", True, o, gamma),
    )


def convolution(case, modulated):
    groups, offset_groups = case.choice(1, 2), case.choice(1, 2)
    kernel = case.choice((3, 3), (1, 1), (2, 3))
    stride, padding, dilation = ((case.integer(low, 2), case.integer(low, 2)) for low in (1, 0, 1))
    height, width = (dilation[i] * (kernel[i] - 1) + 1 + case.integer(0, 3) for i in (0, 1))
    n = 2
    input, weight = case.normal(n, 4, height, width), case.normal(2, 4 // groups, *kernel)
    out = [((height, width)[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    points = offset_groups * kernel[0] * kernel[1]
    larger = [size + case.choice(0, 0, 1) for size in out] if modulated else out  # DyHead's, read up to what is needed
    offset, mask = case.offsets(n, 2 * points, *larger), case.normal(n, points, *larger)

    def read(values):
        return values.reshape(n, -1)[:, : values.shape[1] * out[0] * out[1]].reshape(n, -1, *out)

    bias = case.normal(2) if modulated and case.choice(True, False) else None
    geometry = (stride, padding, dilation, groups, offset_groups)
    if not modulated:
        return (
            lambda x, o, w: mmcv.ops.deform_conv2d(x, o, w, *geometry, False, case.choice(1, 2)),
            [input, offset, weight],
            lambda x, o, w: mmcv_loops.deformable_convolution(x, o, None, w, None, *geometry),
        )
    return (
        lambda x, o, m, w, *b: mmcv.ops.modulated_deform_conv2d(x, o, m, w, *(b or [None]), *geometry),
        [input, offset, mask, weight] + ([] if bias is None else [bias]),
        lambda x, o, m, w, b=None: mmcv_loops.deformable_convolution(x, read(o), read(m), w, b, *geometry),
    )


def deform_conv(case):
    return convolution(case, False)


def modulated_deform_conv(case):
    return convolution(case, True)


def deformable_attention(case):
    shapes = [(case.integer(1, 4), case.integer(1, 4)) for _ in range(case.integer(1, 2))]
    n, heads, queries, points = case.integer(1, 2), case.integer(1, 2), 0 if case.empty else 3, case.integer(1, 2)
    value = case.normal(n, sum(h * w for h, w in shapes), heads, 2)
    locations = case.normal(n, queries, heads, len(shapes), points, 2, size=0.5) + 0.5
    weights = case.normal(n, queries, heads, len(shapes), points)
    function = sys.modules["mmcv.ops.multi_scale_deform_attn"].MultiScaleDeformableAttnFunction
    start = torch.tensor([0, *(h * w for h, w in shapes[:-1])])
    return (
        lambda v, at, w: function.apply(v, torch.tensor(shapes), start, at, w, 64),
        [value, locations, weights],
        lambda v, at, w: mmcv_loops.deformable_attention(v, shapes, at, w),
    )


def focal_loss(case, function, loops, least, reduction):
    n, classes = 0 if case.empty else case.integer(1, 5), case.integer(1, 4)
    logits, gamma, alpha = case.normal(n, classes, size=3.0), case.choice(1.0, 2.0, 2.5), 0.25
    weight = case.choice(None, case.normal(classes).abs())
    # `classes` is background, for which there is no class weight
    target = torch.tensor(case.rng.integers(least, classes + (least == 0 and weight is None), n))
    return (
        lambda x: function(x, target, gamma, alpha, weight, reduction),
        [logits],
        lambda x: getattr(loops(x, target.numpy(), weight, gamma, alpha), "sum" if reduction == "sum" else "copy")(),
    )


def sigmoid_focal_loss(case):
    return focal_loss(case, mmcv.ops.sigmoid_focal_loss, mmcv_loops.sigmoid_focal_loss, 0, "none")


def softmax_focal_loss(case):
    # mmcv itself multiplies gradients of single rows along the wrong axis
    return focal_loss(case, mmcv.ops.softmax_focal_loss, mmcv_loops.softmax_focal_loss, -1, "sum")


def carafe(case):
    n, groups, kernel, scale = 0 if case.empty else 2, case.choice(1, 2), case.choice(1, 3, 5), case.choice(1, 2, 3)
    height, width = case.integer(1, 3), case.integer(1, 3)
    masks = case.normal(n, groups * kernel**2, height * scale, width * scale)
    return (
        lambda x, m: mmcv.ops.carafe(x, m, kernel, groups, scale),
        [case.normal(n, 2, height, width), masks],
        lambda x, m: mmcv_loops.carafe(x, m, kernel, groups, scale),
    )


def psa_mask(case):
    n, size, collect = 0 if case.empty else 2, (case.integer(1, 5), case.integer(1, 5)), case.choice(True, False)
    masks = case.normal(n, size[0] * size[1], case.integer(1, 4), case.integer(1, 4))
    return (
        mmcv.ops.PSAMask("collect" if collect else "distribute", size),
        [masks],
        lambda m: mmcv_loops.psa_mask(m, collect, size),
    )


DIFFERENTIABLE = [
    roi_align,
    roi_pool,
    precise_roi_pool,
    deform_roi_pool,
    deform_conv,
    modulated_deform_conv,
    deformable_attention,
    sigmoid_focal_loss,
    softmax_focal_loss,
    carafe,
    psa_mask,
]
COMPILED_ON_CPU = [roi_align, deform_conv, modulated_deform_conv, psa_mask]


def results(call, inputs, seed):
    """The output and, for a random gradient, the gradients of the inputs."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    output = call(*leaves)
    grad = torch.tensor(np.random.default_rng(seed).normal(size=output.shape), dtype=output.dtype)
    grads = torch.autograd.grad(output, leaves, grad, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(v) if g is None else g for v, g in zip(inputs, grads, strict=True))]


@pytest.mark.parametrize("draw", DIFFERENTIABLE, ids=lambda draw: draw.__name__)
def test_loops_agree(draw):
    for seed in range(ROUNDS):
        call, inputs, loops = draw(Case(seed, torch.float64))
        with operators(stand_in):
            got = call(*inputs)
        expected = torch.from_numpy(np.asarray(loops(*(value.numpy() for value in inputs)), dtype=np.float64))
        assert_same([got + 1], [expected + 1], 1e-12)  # the inputs are as large as 1, sums of them may be smaller


@pytest.mark.parametrize("draw", DIFFERENTIABLE, ids=lambda draw: draw.__name__)
def test_gradients_are_the_derivatives(draw):
    for seed in (seed for seed in range(ROUNDS) if seed % 4 and seed % 10):  # neither kinks nor empty tensors
        call, inputs, _ = draw(Case(seed, torch.float64))
        leaves = [value.requires_grad_() for value in inputs]
        if draw is deform_roi_pool:
            leaves = [leaves[0], leaves[1].detach()]  # mmcv's derivative by the offsets is another one at the border
        with operators(stand_in):
            assert torch.autograd.gradcheck(call, leaves, fast_mode=True), seed


def test_derivative_by_offsets_of_deformable_roi_pooling():
    for seed in range(1, ROUNDS, 4):
        case = Case(seed, torch.float64)
        input, rois = case.normal(2, 2, 12, 12), torch.tensor([[1, 3.3, 2.7, 8.1, 7.7]], dtype=torch.float64)
        offset = case.normal(1, 2, 2, 2)
        with operators(stand_in):
            assert torch.autograd.gradcheck(
                lambda x, o, r=rois: mmcv.ops.deform_roi_pool(x, r, o, 2, 1.0, 0, 0.1),
                (input.requires_grad_(), offset.requires_grad_()),
                fast_mode=True,
            )


@not_compiled
@pytest.mark.parametrize("draw", COMPILED_ON_CPU, ids=lambda draw: draw.__name__)
def test_compiled_mmcv_agrees(draw):
    for seed in range(ROUNDS):
        found = []
        for module in (stand_in, in_use):
            call, inputs, _ = draw(Case(seed))
            with operators(module):
                found.append(results(call, inputs, seed))
        assert_same(*found, 1e-5)


# ---- layers


def test_masked_convolution_is_a_convolution_at_the_mask():
    for seed in range(ROUNDS):
        case = Case(seed)
        kernel = case.choice(1, 3)
        input, weight, bias = (
            case.normal(1, 2, 5, case.integer(3, 6)),
            case.normal(3, 2, kernel, kernel),
            case.normal(3),
        )
        mask = torch.tensor(case.rng.random((1, *input.shape[2:])) < (0 if case.empty else 0.5)).float()
        with operators(stand_in):
            got = mmcv.ops.masked_conv2d(input, mask, weight, bias, kernel // 2)
        assert_near([got + 1], [F.conv2d(input, weight, bias, padding=kernel // 2) * mask + 1], 1e-5)


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sync_batch_norm_is_batch_norm(one_process):
    for seed in range(ROUNDS):
        case = Case(seed)
        shape = (case.integer(1, 3), 3, 2, case.integer(1, 4))
        input, grad = case.normal(*shape), case.normal(*shape)
        own, expected = mmcv.ops.SyncBatchNorm(3, momentum=0.2), torch.nn.BatchNorm2d(3, momentum=0.2)
        own.load_state_dict(expected.state_dict(), strict=False)
        with torch.no_grad():
            for layer in (own, expected):
                layer.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
                layer.bias.copy_(torch.tensor([0.1, 0.0, 0.3]))
        with operators(stand_in):
            found = []
            for layer in (own, expected):
                x = input.clone().requires_grad_()
                output = layer(x)
                grads = torch.autograd.grad(output, [x, layer.weight, layer.bias], grad)
                found.append([output, *grads, layer.running_mean, layer.running_var])
        (output, by_input, *others), (expected_output, expected_by_input, *expected_others) = found
        assert_near([output, *others], [expected_output, *expected_others], 1e-5)
        # a difference of numbers as large as grad / std
        scale = (2 * grad.abs().amax((0, 2, 3)) / (input.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()).max()
        assert (by_input - expected_by_input).abs().max() <= 1e-5 * scale


# ---- the module


def test_every_function_has_the_arguments_of_the_compiled_one():
    names = [name for name, value in vars(stand_in).items() if callable(value) and not name.startswith("_")]
    assert len(names) == 39
    if hasattr(in_use, "STAND_IN"):
        return  # mmcv.ops passes them by name in the other tests
    for name in names:
        signature = re.match(r"\w+\((.*)\) ->", getattr(in_use, name).__doc__)
        expected = re.findall(r"(\w+): ", signature.group(1))
        assert list(inspect.signature(getattr(stand_in, name)).parameters) == expected, name


def test_other_operators_fail_when_called():
    with pytest.raises(
        NotImplementedError, match=r"^[^\n]*box_iou_rotated[^\n]*: pip install --no-build-isolation[^\n]*$"
    ):
        stand_in.box_iou_rotated(torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 1), mode_flag=0, aligned=False)
    assert not hasattr(stand_in, "__path__")  # a module, no package


def test_reduced_precision_and_autocast():
    generator = torch.Generator().manual_seed(0)
    input, rois = torch.randn(1, 2, 6, 6, generator=generator), torch.tensor([[0, 0.5, 0.5, 5, 4]])
    with operators(stand_in):
        expected = mmcv.ops.roi_align(input, rois, 2)
        got = mmcv.ops.roi_align(input.bfloat16(), rois.bfloat16(), 2)
        assert got.dtype == torch.bfloat16
        assert_near([got], [expected], 2**-6)
        masks = torch.randn(1, 9, 12, 12, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            got = mmcv.ops.carafe(input, masks, 3, 1, 2)
        assert torch.equal(got, mmcv.ops.carafe(input, masks, 3, 1, 2))


def test_mmcv_of_another_major_version(monkeypatch):
    monkeypatch.setattr(mmcv, "__version__", "1.7.2")
    with pytest.raises(ImportError, match=r"^mmcv 1\.7\.2 [^\n]*pip install[^\n]*$"):
        mmcv_ext.fill_module(types.ModuleType("mmcv._ext"))


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.ops", raising=False)
    with operators(stand_in), pytest.raises(ModuleNotFoundError, match=r"^[^\n]*pip install torchvision$"):
        mmcv.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
