"""For mkdocs: the pages at the repository's root (README, CHANGELOG, CONTRIBUTING) become pages of the site.

Links between the two places are rewritten. A link to a file that is not a page becomes its words alone. Pages that a docstring
names, as docs/order.md, become links in the Python reference. What looks like an HTML tag, such as <image>, is text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


class TagsAreText(Extension):
    """Show <image> and its like as they are written: as HTML they would vanish from the page."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.deregister("html")


def on_config(config: Any) -> Any:
    """Read Markdown without HTML."""
    config.markdown_extensions.append(TagsAreText())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages."""
    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=_moved((ROOT / source).read_text(), ROOT)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn links of docs/ to the root's pages, or out of the documentation."""
    if page.file.generated_by:
        return markdown
    return _moved(markdown, Path(page.file.abs_src_path).parent)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Turn the pages that docstrings name into links."""
    if not page.url.startswith("reference/"):
        return html
    return re.sub(r"\bdocs/([\w-]+)\.md(#[\w-]+)?", r'<a href="../../\1/\2">\1.md</a>', html)


def _moved(markdown: str, folder: Path) -> str:
    def link(found: re.Match[str]) -> str:
        picture, words, target, anchor = found.groups()
        path = (folder / target).resolve()
        docs = ROOT / "docs"
        if path.parent == ROOT and path.name in PAGES:
            depth = len(folder.relative_to(docs).parts) if folder.is_relative_to(docs) else 0
            return f"{picture}[{words}]({'../' * depth}{PAGES[path.name]}{anchor or ''})"
        if not path.is_relative_to(docs):
            return words
        return f"{picture}[{words}]({path.relative_to(docs)}{anchor or ''})" if folder == ROOT else found[0]

    return _LINK.sub(link, markdown)
