"""The READMEs of the config folders and their drawings, beside the table and the op's own windows."""

import re

import pytest
import torch
import zoo_pages

from dinat_backbones import neighborhood_attention_2d, zoo
from helpers import ROOT

DOCUMENTS = zoo_pages.documents(ROOT)
ROWS = [row for row in zoo.rows() if getattr(row, "config", None)]


def test_the_committed_files_are_the_generated_ones():
    assert [path for path, text in DOCUMENTS.items() if not path.is_file() or path.read_text() != text] == []


@pytest.mark.parametrize("folder", sorted({row.config.rpartition("/")[0] for row in ROWS}))
def test_readme_has_every_config_of_its_folder_with_its_results(folder):
    lines = DOCUMENTS[ROOT / "configs" / folder / "README.md"].splitlines()
    rows = [row for row in ROWS if row.config.rpartition("/")[0] == folder]
    configs = {path.name for path in (ROOT / "configs" / folder).glob("*.py")}
    assert {name for name in configs if any(f"]({name})" in line for line in lines)} == configs
    for row in rows:
        (line,) = [line for line in lines if f"]({row.config.rpartition('/')[2]})" in line]
        cells = [cell.strip() for cell in line.split("|")]
        results = [row.params_m, row.gmacs, *(getattr(row, name, None) for name in ("box_ap", "mask_ap", "pq", "ap"))]
        results += [getattr(row, name, None) for name in ("miou_single_scale", "miou", "miou_multi_scale")]
        assert {str(value) for value in results if value is not None} <= set(cells)
        assert f"({row.checkpoint})" in line


@pytest.mark.parametrize("dilation", [1, 3])
def test_drawing_shows_the_keys_that_the_op_reads(dilation):
    """The keys with a gradient of the value are those of the window."""
    size, kernel_size = (21, 26), 5
    cells = re.findall(r'<path d="([^"]*)"', zoo_pages.drawing(size, kernel_size, [dilation], title="test"))
    queries = ((size[0] // 2, size[1] // 2), (0, size[1] // 5), (size[0] - 1, size[1] - 1))
    for path, query in zip(cells, queries, strict=True):
        value = torch.zeros(1, *size, 1, 1, requires_grad=True)
        key = torch.zeros(1, *size, 1, 1)
        out = neighborhood_attention_2d(key, key, value, kernel_size=kernel_size, dilation=dilation)
        out[0, query[0], query[1]].sum().backward()
        expected = value.grad[0, :, :, 0, 0].nonzero().tolist()
        corners = [tuple(map(int, corner)) for corner in re.findall(r"M(\d+) (\d+)", path)]
        left, top = zoo_pages.GAP, zoo_pages.TOP + zoo_pages.GAP
        drawn = [[(y - top) // zoo_pages.CELL, (x - left) // zoo_pages.CELL] for x, y in corners]
        assert drawn == expected
