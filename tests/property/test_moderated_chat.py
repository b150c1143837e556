"""The functions of `moderated_chat`, on any text, cut into chunks in any way, with verdicts that take any time.

`EXAMPLES=5000` searches further, and at random.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import given
from hypothesis import strategies as st

from tests.property.test_random_workflows import search
from torchserve_dag import Chat, ChatMessage, FunctionCall, Moderation, TextChunk, ToolCall, Usage

T = TypeVar("T")
spec = importlib.util.spec_from_file_location(
    "moderated_chat", Path(__file__).parents[2] / "workflows" / "moderated_chat.py"
)
assert spec is not None
assert spec.loader is not None
module = sys.modules["moderated_chat"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

BAD, USAGE = "bad", Usage.of(3, 4)
PARTS = [
    "a",
    " ",
    "word ",
    "bad",
    "b",
    "ad",
    ". ",
    "! ",
    ".",
    "\n",
    "。",
    "؟ ",
    "שלום",
    "مرحبا ",
    "é",
    "👩‍👩‍👧",
    "x" * 300,
    "word " * 80,
]
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=4), max_size=12).map("".join)


def flagged(text: str) -> bool:
    return BAD in text


@st.composite
def answers(draw: st.DrawFn) -> list[TextChunk]:
    """An answer in chunks, as an engine gives it."""
    text = draw(texts)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=20)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [*map(TextChunk, parts), TextChunk(finish_reason="stop", usage=USAGE, served_by="test")]


async def source(items: Sequence[T], waits: Sequence[int], given_: list[T]) -> AsyncIterator[T]:
    """The items, each after so many turns of the loop; `given_` are those that have come."""
    for item, turns in zip(items, waits, strict=True):
        for _ in range(turns):
            await asyncio.sleep(0)
        given_.append(item)
        yield item


async def all_of(iterator: AsyncIterator[T]) -> list[T]:
    return [one async for one in iterator]


def cut(chunks: Sequence[TextChunk]) -> list[Any]:
    return asyncio.run(all_of(module.pieces(source(chunks, [0] * len(chunks), []))))


@search(300)
@given(chunks=answers())
def test_pieces_are_the_answer_whole_and_each_is_checked_with_what_came_before(chunks: list[TextChunk]) -> None:
    text = "".join(chunk.text for chunk in chunks)
    found = cut(chunks)

    assert "".join(piece.chunk.text for piece in found) == text
    assert all(0 < len(piece.chunk.text) <= module.MOST for piece in found[:-1])
    assert len(found[-1].chunk.text) <= module.MOST
    assert all(piece.checked.text.endswith(piece.chunk.text) for piece in found)
    assert all(len(piece.checked.text) <= module.MOST + module.CONTEXT for piece in found)
    assert [piece.chunk.finish_reason for piece in found] == [None] * (len(found) - 1) + ["stop"]
    assert (found[-1].chunk.usage, found[-1].chunk.served_by) == (USAGE, "test")


@search(300)
@given(chunks=answers())
def test_pieces_do_not_depend_on_the_chunks(chunks: list[TextChunk]) -> None:
    text = "".join(chunk.text for chunk in chunks)
    letter_by_letter = [TextChunk(letter) for letter in text]

    assert cut([*letter_by_letter, chunks[-1]]) == cut(chunks) == cut([TextChunk(text), chunks[-1]])


@search(400)
@given(chunks=answers(), data=st.data())
def test_what_is_released_is_checked_and_all_of_it_where_nothing_is_flagged(
    chunks: list[TextChunk], data: st.DataObject
) -> None:
    pieces = cut(chunks)
    verdicts = [Moderation(flagged(piece.checked.text)) for piece in pieces]
    waits = [data.draw(st.lists(st.integers(0, 3), min_size=len(pieces), max_size=len(pieces))) for _ in range(2)]
    judged: list[Moderation] = []
    text = "".join(chunk.text for chunk in chunks)

    async def run() -> list[TextChunk]:
        taken = module.released(
            Moderation(flagged=False), source(pieces, waits[0], []), source(verdicts, waits[1], judged)
        )
        released: list[TextChunk] = []
        async for chunk in taken:
            released.append(chunk)
            ahead = len(released) - (chunk.finish_reason == "content_filter")
            assert len(judged) >= ahead  # each chunk is a piece, and its verdict was there
            assert not any(verdict.flagged for verdict in judged[:ahead])
        return released

    found = asyncio.run(run())
    said = "".join(chunk.text for chunk in found)

    assert text.startswith(said)
    assert BAD not in said
    assert (said == text, found[-1].finish_reason) == ((True, "stop") if BAD not in text else (False, "content_filter"))
    assert [chunk.finish_reason for chunk in found[:-1]] == [None] * (len(found) - 1)
    assert (found[-1].usage, found[-1].served_by) == (USAGE, "test")


@search(50)
@given(chunks=answers())
def test_of_a_flagged_prompt_nothing_is_answered_but_its_categories(chunks: list[TextChunk]) -> None:
    pieces = cut(chunks)
    verdict = Moderation(flagged=True, categories={"rude": True, "violent": False}, category_scores={})
    judged: list[Moderation] = []
    feeds = source(pieces, [0] * len(pieces), []), source([verdict], [0], judged)
    (found,) = asyncio.run(all_of(module.released(verdict, *feeds)))

    assert found == TextChunk(
        "This cannot be answered: it was flagged as rude.",
        finish_reason="content_filter",
        usage=USAGE,
        served_by="test",
    )
    assert not judged


values = st.recursive(
    st.sampled_from(["a", BAD, "b"]) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["k", BAD]), inner, max_size=2),
    max_leaves=6,
)


@search(200)
@given(value=values, data=st.data())
def test_calls_of_tools_are_checked_as_what_they_say_and_released_whole(value: Any, data: st.DataObject) -> None:
    """Also where JSON writes every letter as an escape, and the call comes in parts."""
    plain_text = json.dumps({"value": value})
    escaped = "".join(f"\\u{ord(letter):04x}" if letter in BAD else letter for letter in plain_text)
    escaped = escaped.replace("v\\u0061lue", "value")
    at = data.draw(st.integers(0, len(escaped)))
    parts = [
        ToolCall(FunctionCall("f", escaped[:at]), "call", "function", 0),
        ToolCall(FunctionCall(arguments=escaped[at:]), index=0),
    ]
    end = TextChunk(finish_reason="tool_calls")
    *before, last = cut([TextChunk("One. "), *(TextChunk(tool_calls=[part]) for part in parts), end])

    assert all(piece.chunk.tool_calls is None for piece in before)
    assert last.chunk.tool_calls == [ToolCall(FunctionCall("f", escaped), "call", "function", 0)]
    assert flagged(last.checked.text) == flagged(plain_text)


@search(100)
@given(said=st.lists(texts, min_size=1, max_size=4))
def test_all_that_a_chat_says_is_judged(said: list[str]) -> None:
    chat = Chat(messages=[ChatMessage("user", text) for text in said])

    assert module.prompt(chat).text == "\n".join(said)
