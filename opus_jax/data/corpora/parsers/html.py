"""Web pages to plain text: blocks become paragraphs, preformatted text stays as it is, navigation goes."""

import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from opus_jax.data.corpora.parsers.plain import documents, files, short_name, text_of
from opus_jax.data.documents import Document

_HEADINGS = tuple(f"h{level}" for level in range(1, 7))
_BLOCKS = frozenset(
    (
        "p",
        "div",
        "section",
        "article",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
        "pre",
        "hr",
        "form",
        "center",
        *_HEADINGS,
    )
)
_LINES = {"br": "\n", "tr": "\n", "dt": "\n", "dd": "\n    \1", "li": "\n- \1"}  # after \1, no space or empty line
_HIDDEN = frozenset(("script", "style", "head", "nav", "noscript", "svg", "select", "button", "textarea"))
_NAVIGATION = re.compile(
    r"\b(navheader|navfooter|nav|menu|searchmenu|tagline|nosearch|toc|fancy_toc|fancy-toc\d|sidebar|hdlink)\b"
)


def page_text(html: str) -> str:
    """The text of a page, with entities decoded."""
    reader = _PageReader()
    reader.feed(html)
    reader.close()
    return reader.text()


def html_files(*patterns: str, without: str | None = None) -> Callable[[Path, str], Iterator[Document]]:
    """A parser of all pages that match the globs, less those whose path matches the expression `without`."""

    def parse(root: Path, package: str) -> Iterator[Document]:
        for path in (path for pattern in patterns for path in files(root, pattern)):
            if without is None or not re.search(without, path.as_posix()):
                yield from documents(page_text(text_of(path)), f"{package}: {short_name(path)}")

    return parse


class _PageReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._out: list[str] = []
        self._hidden_tag: str | None = None  # the element whose content is being left out
        self._hidden_depth = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._hidden_tag is not None:
            self._hidden_depth += tag == self._hidden_tag
        elif tag in _HIDDEN or (tag in ("div", "ul", "table") and _NAVIGATION.search(dict(attrs).get("class") or "")):
            self._hidden_tag, self._hidden_depth = tag, 1
        else:
            self._open(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden_tag is not None:
            self._hidden_depth -= tag == self._hidden_tag
            if self._hidden_depth == 0:
                self._hidden_tag = None
            return
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        if tag in _BLOCKS:
            self._out.append("\0")

    def handle_data(self, data: str) -> None:
        if self._hidden_tag is not None:
            return
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if self._out and self._out[-1][-1:] in ("\0", "\n", " "):
                data = data.lstrip()
        if data:
            self._out.append(data)

    def text(self) -> str:
        """Any number of block edges (NUL), with the white space before and between them, is one empty line."""
        joined = re.sub("\1[ \n\0]*", "", "".join(self._out))
        return re.sub(r"[ \n]*\0(?:[ \n]*\0)*\n*", "\n\n", joined)

    def _open(self, tag: str) -> None:
        if tag == "pre":
            self._preformatted += 1
        if tag in _BLOCKS:
            self._out.append("\0")
        elif tag in _LINES:
            self._out.append(_LINES[tag])
        elif tag in ("td", "th") and self._out and self._out[-1] != "\n":
            self._out.append(" | ")
