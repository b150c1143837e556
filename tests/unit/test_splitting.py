"""Documents become sections, and sections passages, whose places lead back into the document."""

from __future__ import annotations

import unicodedata

import hypothesis
import pytest
from hypothesis import strategies

from torchserve_dag.retrieval import html, markdown
from torchserve_dag.retrieval.sections import Section
from torchserve_dag.retrieval.splitting import MOST_CHARACTERS, halved, split

MARKDOWN = """\
---
title: no heading
---
Before any heading.

# The *front* [door](exposed.md)

It listens.

## Ports ##

```sh
# a comment, no heading
```

Rest
----

| a | b |
|---|---|
"""


def test_markdown_has_the_headings_of_both_kinds_and_none_of_a_fence() -> None:
    found = [(section.heading, section.line) for section in markdown.sections(MARKDOWN)]

    assert found == [
        ("", 1),
        ("The front door", 6),
        ("The front door > Ports", 10),
        ("The front door > Rest", 16),
    ]


def test_a_passage_is_what_stands_at_its_place() -> None:
    for newline in ("\n", "\r\n"):
        text = MARKDOWN.replace("\n", newline)
        pieces = list(split(markdown.sections(text), 30))

        assert all(text[one.begin : one.end] == one.text for one in pieces)
        assert all(text.count("\n", 0, one.begin) + 1 == one.line for one in pieces)
        assert "".join("".join(one.text for one in pieces).split()) == "".join(text.split())


def test_a_passage_ends_at_the_best_place_there_is() -> None:
    words = "One two three. Four five six"
    paragraphs = [one.text for one in split([Section(f"{words}\n\n{words}\n{words}", "", 0, 1)], 45)]
    sentences = [one.text for one in split([Section(words, "", 0, 1)], 20)]

    assert paragraphs == [words, words, words]
    assert sentences == ["One two three.", "Four five six"]


@hypothesis.given(strategies.text(max_size=400), strategies.integers(1, 60))
def test_any_text_is_split_and_nothing_is_lost(text: str, most: int) -> None:
    pieces = list(split([Section(text, "", 0, 1)], most))

    assert all(len(one.text) <= most and text[one.begin : one.end] == one.text for one in pieces)
    assert "".join("".join(one.text for one in pieces).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "text", ["שלום עולם. " * 200, "مرحبا بالعالم؟ " * 200, "これは文書です。" * 300, "x" * 5000, "e\u0301" * 2000]
)
def test_texts_of_every_script_are_split(text: str) -> None:
    """Right to left, without spaces, and without any place to end; an accent stays with its letter."""
    pieces = list(split([Section(text, "", 0, 1)]))

    assert len(pieces) > 1
    assert all(len(one.text) <= MOST_CHARACTERS for one in pieces)
    assert not any(unicodedata.combining(one.text[0]) for one in pieces)


def test_a_passage_that_is_too_long_for_the_model_is_halved() -> None:
    (piece,) = split([Section("First line.\nSecond line.", "Heading", 100, 7)])
    first, second = halved(piece)

    assert (first.text, first.begin, first.line) == ("First line.", 100, 7)
    assert (second.text, second.begin, second.line, second.heading) == ("Second line.", 112, 8, "Heading")
    assert halved(first)[0].end < first.end
    assert halved(halved(halved(halved(halved(first)[0])[0])[0])[0]) == []


PAGE = """<!doctype html><html><head><title>t</title><style>p {color: red}</style></head>
<body><nav><a href="/">Home</a></nav>
<h1>The <b>front</b> door</h1>
<p>It listens
   on port &lt;8443&gt;.</p><script>alert(1)</script>
<h2>Table</h2>
<table><tr><td>a</td><td>b</td></tr></table>
<pre>one
  two</pre></body>"""


def test_html_has_the_text_that_a_reader_sees_and_the_lines_of_its_file() -> None:
    front, table = html.sections(PAGE)
    lines = [(one.text, one.line) for one in split([front, table], 13)]

    assert front.text == "The front door\n\nIt listens on port <8443>.\n\n"
    assert (front.heading, front.line) == ("The front door", 3)
    assert table.heading == "The front door > Table"
    assert "a | b" in table.text
    assert "one\n  two" in table.text
    assert lines[-3:] == [("Table", 6), ("a | b", 7), ("one\n  two", 8)]
    assert lines[2] == ("It listens", 4)


def test_html_that_is_broken_or_deep_is_read() -> None:
    """Tags that are never closed, or a hundred thousand of them."""
    (section,) = html.sections("<div>" * 100_000 + "text <b>bold</i> <p>more &unknown; &#x110000;")

    assert section.text.startswith("text bold\n")
