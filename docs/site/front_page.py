"""A hook of mkdocs: the site's first page is the README, with its links as they are from docs/."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ELSEWHERE = {"(CONTRIBUTING.md": "(contributing.md"}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    if page.file.src_uri != "index.md":
        return markdown
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for there, here in ELSEWHERE.items():
        text = text.replace(there, here)
    return text
