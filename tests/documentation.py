"""The code blocks and commands of README.md, CONTRIBUTING.md, docs/ and the READMEs in configs/."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from helpers import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("configs/**/*.md"),
    )
)
# What the name after the fence makes of a block. Whatever is in none of these is an error.
LANGUAGES = {
    "python": "executed, by test_snippets.py",
    "bash": "a command per line, each with a rule in test_commands.py",
    "text": "an example of output or of folders",
    "bibtex": "a citation",
}
FENCE = re.compile(r"^```(.*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: path from the root of the checkout.
        line: number of its first line in the page.
        language: what stands behind the fence.
        text: its lines, without the fences.
    """

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a bash block, with continuation lines joined and without its comment."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def read_page(page: str) -> str:
    return Path(ROOT, page).read_text()


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a page, all or those of one language."""
    found, start, words, lines = [], 0, "", []
    for number, line in enumerate(read_page(page).splitlines(), 1):
        fence = FENCE.match(line.strip())
        if not fence:
            lines.append(line)
        elif start:
            found.append(Block(page, start, words, "\n".join(lines) + "\n"))
            start = 0
        else:
            start, words, lines = number + 1, fence[1].strip(), []
    if start:
        raise ValueError(f"{page}:{start}: the block has no end")
    return [block for block in found if language in (None, block.language)]


def commands(page: str) -> list[Command]:
    """Every command of the page's bash blocks."""
    found = []
    for block in blocks(page, "bash"):
        pending, first = "", 0
        for number, line in enumerate(block.text.splitlines(), block.line):
            first = first if pending else number
            pending += line
            if pending.endswith("\\"):
                pending = pending[:-1]
                continue
            words = shlex.split(pending, comments=True)
            if words:
                code = re.sub(r"\s#.*$", "", pending).strip()
                found.append(Command(block.page, first, " ".join(code.split())))
            pending = ""
        if pending:
            raise ValueError(f"{page}:{first}: {pending!r} is not continued")
    return found
