"""The site's front page is README.md, and pages may link to configs and other files of the checkout: both become part of
the site, so that mkdocs checks the links to them like any other."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()(\.\./)+((?:configs|mask2former|tools|dinat_backbones|tests)/[^)#]+)")


def on_files(files, config):
    """Add README.md as the front page, and the files that pages link to outside of docs/."""
    front = (ROOT / "README.md").read_text().replace("](docs/", "](")
    pages = [file.content_string for file in files if file.src_uri.endswith(".md")] + [front]
    linked = {match[3] for text in pages for match in LINK.finditer(text)}
    linked |= {
        match[1] for match in re.finditer(r"\]\(((?:configs|CONTRIBUTING|CHANGELOG|CITATION|LICENSE)[^)#]*)\)", front)
    }
    for name in sorted(linked):
        if (ROOT / name).is_file():
            files.append(File(name, str(ROOT), config["site_dir"], use_directory_urls=False))
    files.append(File.generated(config, "index.md", content=front))
    return Files(list(files))


def on_page_markdown(markdown, page, config, files):
    """Links that leave docs/ stay inside the site: "../configs/a.py" from the top is "configs/a.py" there."""
    up = "../" * page.file.src_uri.count("/")
    return LINK.sub(rf"\1{up}\3", markdown)
