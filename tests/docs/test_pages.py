"""What all pages have to be: blocks of known languages, paths and commands that exist, a site that builds."""

import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from dinat_backbones import cli
from documentation import LANGUAGES, PAGES, blocks, read_page
from helpers import ROOT

# In prose: files and folders of the checkout, and commands
PATH = re.compile(r"`((?:dinat_backbones|configs|docs|mask2former|requirements|tests|tools)/[^`\s<>*]*)`")
COMMAND = re.compile(r"`dinat ([a-z0-9]+)")
STARTS_A_COMMAND = re.compile(r"^\s*(\$|dinat|pip|python|make|git|torchrun|mim|export|cd)\b")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_is_tested(page):
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r}; expected one of {', '.join(LANGUAGES)}"
        if block.language in ("text", "bibtex"):
            hidden = [line for line in block.text.splitlines() if STARTS_A_COMMAND.match(line)]
            assert hidden == [], f"{where}: commands belong into a bash block, where they are tested"


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_indented_code(page):
    """Indented code is not fenced, so nothing would test it."""
    outside, inside = [], False
    for line in read_page(page).splitlines():
        inside ^= line.strip().startswith("```")
        outside.append("" if inside else line)
    indented = [line for before, line in zip(outside, outside[1:], strict=False) if not before and line[:4] == "    "]
    assert [line for line in indented if not re.match(r"\s+(-|\d+\.|options:|members)", line)] == []


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_commands_in_prose_exist(page):
    text = read_page(page)
    assert [path for path in PATH.findall(text) if not (ROOT / path).exists()] == []
    assert set(COMMAND.findall(text)) <= set(cli.COMMANDS)


def test_every_command_is_documented():
    text = "".join(map(read_page, PAGES))
    assert [name for name in cli.COMMANDS if f"dinat {name}" not in text] == []


@pytest.mark.skipif(
    not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings_handlers")),
    reason='mkdocs is not installed: pip install "dinat_backbones[docs]"',
)
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.removeprefix("docs/").removesuffix(".md") for page in PAGES if page.startswith("docs/")}
    built = {page for page in pages if (tmp_path / "site" / page.removesuffix("index") / "index.html").is_file()}
    assert built == pages
    front = (tmp_path / "site" / "index.html").read_text()
    assert "Dilated Neighborhood Attention Transformers" in front  # README.md
    op = (tmp_path / "site" / "api" / "op" / "index.html").read_text()
    assert "kernel_size" in op and "RuntimeError" in op  # from the docstring
