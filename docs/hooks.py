"""README.md is the front page of the site, and pages may link to files outside of docs/, configs for example.

Both become part of the site, so that mkdocs checks these links like any other.
"""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "(?:configs|mask2former|tools|tests|dinat_backbones)/[^)#]+"
LINK = re.compile(rf"(\]\()(?:\.\./)+({OUTSIDE})")
LINK_OF_README = re.compile(rf"\]\(({OUTSIDE}|(?:CHANGELOG|CITATION|CONTRIBUTING|LICENSE)[^)#]*)\)")


def on_files(files, config):
    """Add README.md, and the files outside of docs/ that pages link to and that exist."""
    front = (ROOT / "README.md").read_text().replace("](docs/", "](")
    pages = [file.content_string for file in files if file.is_documentation_page()]
    linked = {match[2] for text in pages for match in LINK.finditer(text)}
    linked |= {match[1] for match in LINK_OF_README.finditer(front)}
    outside = [
        File(name, str(ROOT), config["site_dir"], use_directory_urls=False)
        for name in sorted(linked)
        if (ROOT / name).is_file()
    ]
    return Files([*files, *outside, File.generated(config, "index.md", content=front)])


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ stay inside the site: "../configs/a.py" of a page at the top is "configs/a.py" there."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"\1{up}\2", markdown)
