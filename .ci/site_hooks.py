"""For mkdocs: README is the first page, and links that lead out of docs/ lead to GitHub."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
OUTSIDE = "https://github.com/seqkernels/seqkernels/blob/main/"


def on_files(files, config):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=relink(text, "docs/", "", r"(?!docs/)")))
    return files


def on_page_markdown(markdown, page, config, files):
    return relink(markdown, "", "../", "") if page.file.src_uri != "index.md" else markdown


def relink(text: str, inside: str, up: str, outside: str) -> str:
    """Links of Markdown and of HTML: those into `inside` lose it, those out of docs/ become GitHub's."""
    begin = r'(\]\(|(?:src|href)=")'
    text = re.sub(rf"{begin}{re.escape(up)}{outside}(?!https?:|#)([^)\"]+)", rf"\g<1>{OUTSIDE}\g<2>", text)
    return re.sub(rf"{begin}{re.escape(inside)}", r"\g<1>", text) if inside else text
