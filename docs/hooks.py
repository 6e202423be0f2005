"""What the site takes from outside docs/: the repository's address, pages, pictures, and links to source files."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import relpath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REPOSITORY = re.search(r'^Repository = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that are files of the repository."""


def on_config(config: Any) -> Any:
    config.repo_url, config.repo_name = REPOSITORY, "GitHub"
    return config


def on_files(files: Any, config: Any) -> Any:
    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link that leaves docs/ leads to the repository; a picture from there becomes part of the site."""
    uri = page.file.src_uri
    folder = ROOT if uri in PAGES else (DOCS / uri).parent

    def mended(link: re.Match) -> str:
        path = (folder / link[1]).resolve()
        if "://" in link[1] or not path.exists() or not path.is_relative_to(ROOT):
            return link[0]
        if path.is_relative_to(DOCS):
            return relpath(path.relative_to(DOCS).as_posix(), Path(uri).parent.as_posix() or ".")
        inside = path.relative_to(ROOT).as_posix()
        if path.suffix != ".png":
            return f"{REPOSITORY}/blob/main/{inside}"
        if files.get_file_from_path(inside) is None:
            files.append(File.generated(config, inside, abs_src_path=str(path)))
        return relpath(inside, Path(uri).parent.as_posix() or ".")

    return re.sub(r"(?<=\]\()([\w./-]+)(?=[#)])", mended, markdown)
