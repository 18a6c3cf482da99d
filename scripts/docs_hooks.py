"""What mkdocs takes from outside of docs/: the changelog, the examples and the measured results, at the links to them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
FOLDERS = {"benchmarks/results/": "*.json", "examples/": "*.py"}
PAGES = {"CHANGELOG.md": "changelog.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add them to the site, each at its path in the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for folder, pattern in FOLDERS.items():
        for path in sorted((ROOT / folder).glob(pattern)):
            files.append(File.generated(config, f"{folder}{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links as they stand in the repository, from docs/ as root."""
    path = page.file.src_uri
    if path in PAGES.values():
        return re.sub(r"\]\(docs/", "](", markdown)
    up = "../" * path.count("/")
    for source, target in ({name: name for name in FOLDERS} | PAGES).items():
        markdown = markdown.replace(f"]({up}../{source}", f"]({up}{target}")
    return markdown
