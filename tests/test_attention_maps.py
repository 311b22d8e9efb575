"""Attention maps of whole models, against the attention recomputed from hooks by a loop over keys."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from dinat_backbones import DiNAT, create_classifier
from dinat_backbones.attention_maps import attention_maps, recorded_attention
from dinat_backbones.cli import attend
from helpers import ROOT, environment, fill_by_name

SMALL = dict(embed_dim=16, depths=[2, 1], num_heads=[2, 2], mlp_ratio=2.0, kernel_size=3, dilations=[[1, 4], [2]])


def keys_of(position, length, kernel_size, dilation):
    """The window along one axis, as the papers say it: counted inside the pixels of the same remainder."""
    same = [index for index in range(length) if index % dilation == position % dilation]
    place = same.index(position)
    start = min(max(place - kernel_size // 2, 0), len(same) - kernel_size)
    return same[start : start + kernel_size], start - place + kernel_size - 1


@pytest.mark.parametrize("height, width", [(60, 72), (21, 40)])  # of the second, maps are padded
def test_weights_and_places(height, width):
    model = fill_by_name(DiNAT(**SMALL)).eval()
    image = torch.randn(2, 3, height, width)
    inputs = {}
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            module.register_forward_hook(lambda m, args, out, name=name: inputs.__setitem__(name, args[0]))
    maps = attention_maps(model, image)
    assert [found.name for found in maps] == [f"levels.{i}.blocks.{j}.attn" for i, j in ((0, 0), (0, 1), (1, 0))]
    for found in maps:
        module, x = model.get_submodule(found.name), inputs[found.name]
        rows_in_map, columns_in_map = x.shape[1:3]
        reach = module.kernel_size * module.dilation
        bottom, right = max(0, reach - x.shape[1]), max(0, reach - x.shape[2])
        x = torch.nn.functional.pad(x, (0, 0, 0, right, 0, bottom))
        qkv = module.qkv(x).view(*x.shape[:3], 3, module.num_heads, module.head_dim)
        for row, column in ((0, 0), (rows_in_map - 1, columns_in_map - 1), (rows_in_map // 2, 1)):
            rows, row_bias = keys_of(row, x.shape[1], 3, module.dilation)
            columns, column_bias = keys_of(column, x.shape[2], 3, module.dilation)
            logits = torch.stack([
                torch.stack([
                    (qkv[1, row, column, 0] * module.scale * qkv[1, r, c, 1]).sum(-1)
                    + module.rpb[:, row_bias + i, column_bias + j]
                    for j, c in enumerate(columns)
                ])
                for i, r in enumerate(rows)
            ])  # fmt: skip
            expected = logits.flatten(0, 1).softmax(0).mean(1).view(3, 3)
            got_rows, got_columns, weights = found.at(row, column, image=1)
            assert (got_rows.tolist(), got_columns.tolist()) == (rows, columns)
            assert torch.allclose(weights, expected, atol=1e-5)
            dense = found.dense(row, column, image=1)
            assert dense.shape == (rows_in_map, columns_in_map)
            for i, r in enumerate(rows):
                for j, c in enumerate(columns):
                    if r < rows_in_map and c < columns_in_map:
                        assert dense[r, c] == weights[i, j]
    with pytest.raises(IndexError, match=r"pixel \(99, 0\): levels.0.blocks.0.attn has a map of"):
        maps[0].at(99, 0)


def test_the_model_computes_what_it_did():
    model = fill_by_name(DiNAT(**SMALL)).eval()
    image = torch.randn(1, 3, 50, 40)
    expected = model(image)
    with recorded_attention(model) as maps:
        inside = model(image)
        model.levels[0].blocks[0].attn(torch.randn(1, 6, 6, 16), return_attention=True)[1].sum().backward()
    after = model(image)
    assert len(maps) == 4
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(inside, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, expected, strict=True))
    with pytest.raises(ValueError, match="Linear has no neighborhood attention"):
        attention_maps(torch.nn.Linear(1, 1), image)


def test_models_of_transformers():
    huggingface = pytest.importorskip("dinat_backbones.adapters.huggingface", reason="transformers is not installed")
    config = huggingface.DinatConfig(
        embed_dim=16, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[1], [2]], out_features=["stage2"]
    )
    model = huggingface.DinatModel(config).eval()
    image = torch.randn(1, 3, 48, 48)
    maps = attention_maps(model, image)
    with torch.no_grad():
        theirs = model(image, output_attentions=True).attentions  # of the last block of each stage
    for found, expected in zip(maps, theirs, strict=True):
        assert torch.allclose(found.weights.permute(0, 3, 1, 2, 4, 5).flatten(4), expected, atol=1e-6)


def run(*words):
    command = [sys.executable, "-m", "dinat_backbones", "attend", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(ROOT))


def test_command(tmp_path):
    """On a classifier; the drawing has the pixel in green where it is, and gaps between the keys of dilated blocks."""
    pytest.importorskip("mmcv", reason="mmcv is not installed")
    torch.manual_seed(0)
    torch.save(create_classifier("dinat_mini").state_dict(), tmp_path / "file.pth")
    Image.new("RGB", (448, 224), (90, 90, 90)).save(tmp_path / "image.png")
    words = [tmp_path / "image.png", "--classifier", "dinat_mini", "--checkpoint", tmp_path / "file.pth"]
    done = run(*words, "--at", "100,150", "--out", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1].endswith("out.png is written") and len(lines) == 18 + 1
    assert lines[0].startswith("levels.0.blocks.0.attn: 7 x 7 keys, 4 pixels apart; ")
    assert lines[1].startswith("levels.0.blocks.1.attn: 7 x 7 keys, 32 pixels apart; ")
    drawing = Image.open(tmp_path / "out.png")
    panel = [drawing.getpixel((6 + x, 20 + y)) for y in range(240) for x in range(240)]
    green = [(i % 240, i // 240) for i, pixel in enumerate(panel) if pixel == (0, 255, 0)]
    (left, top), (right, bottom) = (min(green), max(green))
    assert abs((left + right) / 2 - 240 * 100 / 448) < 5 and abs((top + bottom) / 2 - 240 * 150 / 224) < 5
    assert "has 448 x 224 pixels" in run(*words, "--at", "448,0", "--out", tmp_path / "out.png").stderr


@pytest.mark.parametrize("name", ["out", "out.txt", "folder.d/0"])
def test_a_drawing_has_the_ending_of_an_image(capsys, name):
    words = ["image.png", "--classifier", "dinat_mini", "--checkpoint", "file.pth", "--at", "1,1", "--out", name]
    with pytest.raises(SystemExit) as stopped:
        attend.main(words)
    assert stopped.value.code == 2
    assert f"argument --out: '{name}' does not end as a format of images does" in capsys.readouterr().err
