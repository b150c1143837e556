"""The text of an HTML page, with the lines of its file: what a browser shows, without menus and scripts.

By Python's own parser, which reads any page, keeps no tree, and knows the lines.
"""

from __future__ import annotations

from html.parser import HTMLParser

from torchserve_dag.retrieval.sections import Heading, Headings, Section

_HIDDEN = {"script", "style", "template", "noscript", "nav", "svg", "math", "select", "head", "iframe", "button"}
_INLINE = {
    "a", "abbr", "b", "bdi", "bdo", "cite", "code", "dfn", "em", "font", "i", "kbd", "mark", "q", "s", "samp", "small",
    "span", "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
}  # fmt: skip
_CELLS = {"td", "th"}
_PARAGRAPHS = {"p", "pre", "ul", "ol", "dl", "table", "blockquote", "section", "article", "div", "figure"}
_HEADINGS = {f"h{level}": level for level in range(1, 7)}


def sections(page: str) -> list[Section]:
    """Each heading with what is below it. Places are those in the text, lines those of the file."""
    reader = _Reader()
    reader.feed(page)
    reader.close()
    reader.end_section()
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Section] = []
        self._headings = Headings()
        self._place = 0
        """Where the section begins."""
        self._lines: list[tuple[str, int]] = []
        """Of the section: each line of the text, and its line in the file."""
        self._words: list[str] = []
        self._began = 1
        """The line of the file in which the words began."""
        self._hidden = self._as_it_stands = 0
        """How many elements are open whose text is not shown, and whose spaces count."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002 (the parser's)
        self._hidden += tag in _HIDDEN
        self._as_it_stands += tag == "pre"
        if tag in _HEADINGS:
            self._end_line()
            self.end_section()
        elif tag in _CELLS:
            self._words.append(" | " if self._words else "")
        elif tag not in _INLINE:
            self._end_line(blank=tag in _PARAGRAPHS)

    def handle_endtag(self, tag: str) -> None:
        if tag in _HEADINGS:
            self._headings.add(Heading(_HEADINGS[tag], " ".join("".join(self._words).split())))
        self._hidden = max(0, self._hidden - (tag in _HIDDEN))
        if tag not in _INLINE | _CELLS:
            self._end_line(blank=tag in _PARAGRAPHS or tag in _HEADINGS)
        self._as_it_stands = max(0, self._as_it_stands - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        first, *others = data.split("\n") if self._as_it_stands else [data]
        self._add(first, 0)
        for down, line in enumerate(others, 1):
            self._end_line(keep=True)
            self._add(line, down)

    def _add(self, text: str, down: int) -> None:
        if not any(self._words):
            lead = text[: len(text) - len(text.lstrip())]
            self._began = self.getpos()[0] + (down if self._as_it_stands else lead.count("\n"))
        self._words.append(text)

    def _end_line(self, *, blank: bool = False, keep: bool = False) -> None:
        """End a line of the text. `blank`: an empty line follows. `keep`: it may be empty."""
        words = "".join(self._words)
        text = words.rstrip() if self._as_it_stands else " ".join(words.split())
        if text or (keep and self._lines):
            self._lines.append((text, self._began))
        if blank and self._lines and self._lines[-1][0]:
            self._lines.append(("", self._began))
        self._words = []

    def end_section(self) -> None:
        self._end_line()
        text = "".join(f"{line}\n" for line, _ in self._lines)
        if text.strip():
            lines = tuple(line for _, line in self._lines)
            self.found.append(Section(text, str(self._headings), self._place, lines[0], lines=lines))
        self._place += len(text)
        self._lines = []
