"""Requests as OpenAI's JSON, and OpenAI's JSON as chunks."""

from __future__ import annotations

import json
from itertools import chain
from typing import Any

import pytest

from torchserve_dag import Chat, InputError, Prompt, TextChunk
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.messages import FunctionCall, JsonSchema, ResponseFormat, TokenLogprob, ToolCall, Usage
from torchserve_dag.runtime.models.language.openai_json import (
    DONE,
    ChunkReader,
    EventReader,
    UpstreamError,
    body_of,
    failure_of,
    parse,
    path_of,
)

MODEL = "small-1"


def event(index: int = 0, reason: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"model": MODEL, "choices": [{"index": index, "delta": delta, "finish_reason": reason}]}


def read(*events: dict[str, Any], answers: int = 1, prompt_tokens: int = 0) -> list[TextChunk]:
    reader = ChunkReader("remote", answers)
    chunks = [chunk for one in events for chunk in reader.read(one)]
    return chunks + reader.end(prompt_tokens)


def test_a_request_has_no_key_for_what_was_not_said() -> None:
    """At any depth: servers refuse null where they expect a value."""
    chat = plain.build(
        Chat,
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}],
                },
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}, "id": "1"}]},
            ],
            "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"default": None}}},
            "tools": [{"function": {"name": "f", "parameters": {"const": None}}}],
            "max_completion_tokens": 9,
            "adapter": "polite",
        },
    )
    body = body_of(chat, MODEL, 7)

    assert body["response_format"]["json_schema"] == {"name": "a", "schema": {"default": None}}
    assert body["tools"] == [{"function": {"name": "f", "parameters": {"const": None}}, "type": "function"}]
    assert json.dumps(body).count("null") == 2  # those of the client's own schemas
    assert {key for key in body if key not in {"messages", "response_format", "tools"}} == {
        "model",
        "max_tokens",
        "stream",
        "stream_options",
    }
    assert body["max_tokens"] == 7
    assert body_of(Prompt(prompt="a"), MODEL, 7, "max_completion_tokens")["max_completion_tokens"] == 7
    assert (path_of(chat), path_of(Prompt(prompt="a"))) == ("chat/completions", "completions")


def test_a_schema_that_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5_000):
        schema = {"items": schema}
    form = ResponseFormat("json_schema", JsonSchema("deep", schema))

    with pytest.raises(InputError, match="nested too deeply"):
        body_of(Chat.of("Hello", response_format=form), MODEL, 7)


def test_the_last_chunk_has_finish_reason_usage_and_who_served() -> None:
    """Though the server sends the usage in an event of its own, after the finish reason."""
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    chunks = read(
        event(role="assistant", content=""),
        event(content="Pa"),
        event(content="ris"),
        event(reason="length"),
        {"choices": [], "usage": usage},
    )

    assert [chunk.text for chunk in chunks] == ["Pa", "ris", ""]
    assert chunks[-1] == TextChunk(finish_reason="length", usage=Usage.of(5, 2, 4), served_by="remote small-1")
    assert chunks[:2] == [TextChunk("Pa"), TextChunk("ris")]


def test_a_server_that_tells_no_usage_gets_an_estimate() -> None:
    chunks = read(event(content="a"), event(content="b", reason="stop"), prompt_tokens=3)

    assert chunks[-1].usage == Usage.of(3, 2)


def test_of_several_answers_each_has_a_finish_reason_and_the_last_the_usage() -> None:
    chunks = read(
        event(1, content="b"),
        event(1, "stop"),
        event(0, content="a"),
        event(0, "length"),
        {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
        answers=2,
    )

    assert [(c.index, c.text, c.finish_reason, bool(c.usage)) for c in chunks] == [
        (1, "b", None, False),
        (1, "", "stop", False),
        (0, "a", None, False),
        (0, "", "length", True),
    ]


def test_a_whole_answer_is_read_like_a_stream() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    chunks = read(
        {
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    )

    assert chunks == [
        TextChunk(
            finish_reason="tool_calls",
            usage=Usage.of(1, 2),
            tool_calls=[ToolCall(FunctionCall("f", "{}"), "c1", "function", 0)],
            served_by="remote small-1",
        )
    ]
    (completion,) = read({"choices": [{"text": "abc", "index": 0, "finish_reason": "stop"}]})
    assert completion.text == "abc"


def test_a_call_of_a_tool_comes_in_parts() -> None:
    parts = [
        {"index": 1, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 1, "function": {"arguments": '{"a"'}},
    ]
    chunks = read(*(event(tool_calls=[part]) for part in parts), event(reason="tool_calls"))

    assert [chunk.tool_calls for chunk in chunks[:2]] == [
        [ToolCall(FunctionCall("f", ""), "c1", "function", 1)],
        [ToolCall(FunctionCall(None, '{"a"'), None, None, 1)],
    ]


def test_log_probabilities_are_read_in_both_forms() -> None:
    """A chat's, and a completion's; minus infinity, which some servers write, becomes a number that JSON has."""
    chat = {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": float("-inf")}]}]}
    completion = {"tokens": ["x", "a"], "token_logprobs": [None, -0.5], "top_logprobs": [None, {"b": -9999.0}]}

    for logprobs in (chat, completion):
        (chunk,) = read({"choices": [{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": "stop"}]})
        assert chunk.logprobs == [TokenLogprob("a", -0.5, [TokenLogprob("b", -9999.0)])]


def test_an_answer_without_a_finish_reason_is_a_failure() -> None:
    with pytest.raises(UpstreamError, match="stopped in the middle") as caught:
        read(event(content="a"))

    assert caught.value.status == 502
    with pytest.raises(UpstreamError, match="stopped in the middle"):
        read(event(content="a", reason="stop"), answers=2)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_the_server_gave_up_is_a_failure(reason: str) -> None:
    with pytest.raises(UpstreamError, match="did not finish"):
        read(event(content="a", reason=reason))


def test_a_failure_in_the_stream_has_the_servers_status_and_sentence() -> None:
    with pytest.raises(UpstreamError, match="too long") as caught:
        read({"error": {"message": "too long", "code": 413}})
    assert caught.value.status == 413
    with pytest.raises(UpstreamError) as caught:
        read({"error": {"message": "broken", "code": "server_error"}})
    assert (caught.value.message, caught.value.status) == ("broken", 502)


@pytest.mark.parametrize(
    "data",
    [
        {"choices": [3]},
        {"choices": 3},
        {"choices": [{"index": 7}]},
        {"choices": [{"index": 0, "delta": {"content": 3}}]},
        {"choices": [{"index": 0, "delta": {"tool_calls": [3]}}]},
        {"choices": [{"index": 0, "text": "a", "logprobs": {"tokens": ["a"]}}]},
        {"usage": [3]},
    ],
)
def test_what_is_not_openais_json_is_a_failure(data: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError, match="no answer of OpenAI's API"):
        read(data)


def test_half_a_surrogate_pair_does_not_reach_the_client() -> None:
    (chunk,) = read({"choices": [{"index": 0, "text": "a\ud83d", "finish_reason": "stop"}]})

    assert chunk.text == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_however_their_bytes_are_cut(size: int) -> None:
    """Line ends of both kinds, comments, an event of two lines, and characters that other readers take for line ends."""
    stream = 'event: x\ndata: {"a":\ndata: 1}\n\n: ping\r\n\r\ndata:é\u2028\x85\r\n\r\ndata: [DONE]\n\n'.encode()
    reader = EventReader()
    events = [data for at in range(0, len(stream), size) for data in reader.read(stream[at : at + size])]

    assert events == ['{"a":\n1}', "é\u2028\x85", DONE]


@pytest.mark.parametrize("part", [b"x" * (1 << 20), b"data: " + b"x" * (1 << 20) + b"\n"], ids=["line", "lines"])
def test_an_event_has_a_greatest_size(part: bytes) -> None:
    reader = EventReader()

    with pytest.raises(UpstreamError, match="8 MiB"):
        list(chain.from_iterable(reader.read(part) for _ in range(9)))


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000])
def test_what_is_no_json_object_is_a_failure(text: str) -> None:
    with pytest.raises(UpstreamError, match="no JSON object"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"error": {"message": "No.", "type": "x"}}', "No."),
        ('{"error": "No."}', "No."),
        ('{"detail": "No."}', "No."),
        ('{"message": "No."}', "No."),
        ("<html>", "The model's server answered 418."),
        ('{"error": {}}', "The model's server answered 418."),
    ],
)
def test_a_refusal_has_the_servers_sentence(text: str, sentence: str) -> None:
    refused = failure_of(418, text)

    assert (refused.message, refused.status) == (sentence, 418)
    assert len(failure_of(400, json.dumps({"error": "a" * 5000})).message) == 500
