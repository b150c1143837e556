"""The workflows of language models, through the front door: by OpenAI's own client, and by gRPC."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from loadtests.language_costs import PERSON
from tests.live.conftest import Serving
from tests.live.openai_access import said
from torchserve_dag import Chat, TextChunk


def streamed(client: openai.OpenAI, model: str, messages: Any, **more: Any) -> tuple[str, str | None]:
    """The text of a streamed answer, and why it ended."""
    text, reason = "", None
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True, **more):
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason


def whole(client: openai.OpenAI, model: str, messages: Any, **more: Any) -> tuple[str, str]:
    answer = client.chat.completions.create(model=model, messages=messages, **more)
    return answer.choices[0].message.content or "", answer.choices[0].finish_reason


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


class TestModeratedChat:
    def test_what_is_harmless_is_answered(self, client: openai.OpenAI) -> None:
        messages = said("What is the capital of France?")

        assert whole(client, "moderated_chat", messages, **GREEDY) == ("The capital of France is Paris.", "stop")
        assert streamed(client, "moderated_chat", messages, **GREEDY) == ("The capital of France is Paris.", "stop")

    def test_what_is_not_is_refused(self, client: openai.OpenAI) -> None:
        messages = said("You are a fucking asshole, you piece of shit.")
        text, reason = whole(client, "moderated_chat", messages, **GREEDY)

        assert reason == "content_filter"
        assert streamed(client, "moderated_chat", messages, **GREEDY) == (text, reason)

    def test_its_classifier_is_a_model_too(self, client: openai.OpenAI) -> None:
        found = client.moderations.create(model="text_moderation", input=["Good morning.", "You fucking asshole."])

        assert [one.flagged for one in found.results] == [False, True]


class TestAskDocs:
    def test_what_is_there_is_answered_with_its_sources(self, client: openai.OpenAI) -> None:
        messages = said("How do I roll a version back?")
        text, reason = whole(client, "ask_docs", messages, **GREEDY)

        assert reason in {"stop", "length"}
        assert "releasing.md" in text
        assert "releasing.md" in streamed(client, "ask_docs", messages, **GREEDY)[0]

    def test_what_is_not_there_is_said(self, client: openai.OpenAI) -> None:
        text, reason = whole(client, "ask_docs", said("Which trees grow on the slopes of Kilimanjaro?"), **GREEDY)

        assert reason == "stop"
        assert "not in the documents" in text


class TestExtract:
    def test_the_answer_fits_the_schema(self, client: openai.OpenAI) -> None:
        messages = said("Ada Lovelace is 36 years old.")
        for text, reason in (
            whole(client, "extract", messages, response_format=PERSON, max_tokens=60, temperature=0),
            streamed(client, "extract", messages, response_format=PERSON, max_tokens=60, temperature=0),
        ):
            document = json.loads(text)
            assert reason == "stop"
            assert set(document) == {"name", "age"}
            assert (type(document["name"]), type(document["age"])) == (str, int)

    def test_an_answer_that_was_cut_off_is_a_failure(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.UnprocessableEntityError, match="cut off"):
            whole(client, "extract", said("Ada is 36."), response_format=PERSON, max_tokens=2)


def test_a_photo_is_described_with_the_right_counts(client: openai.OpenAI, photo_path: Path) -> None:
    url = "data:image/jpeg;base64," + base64.b64encode((photo_path / "coffee.jpg").read_bytes()).decode()
    messages: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    text, reason = whole(client, "describe_photo", messages, **GREEDY)

    assert reason == "stop"
    assert "cup" in text.lower() or "espresso" in text.lower()
    assert streamed(client, "describe_photo", messages, **GREEDY)[0]


def test_where_no_hosted_model_is_another_answers(client: openai.OpenAI) -> None:
    """The demo has no key for a hosted model, so each request falls back, and says who answered."""
    answer = client.chat.completions.create(
        model="chat_with_fallback", messages=said("What is the capital of France?"), **GREEDY
    )

    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.system_fingerprint == "own large model"


def test_a_model_that_may_call_tools_answers(client: openai.OpenAI) -> None:
    text, reason = whole(client, "tools", said("What is the capital of France?"), **GREEDY)

    assert text
    assert reason in {"stop", "length"}


@pytest.mark.parametrize("model", ["moderated_chat", "extract"])
def test_grpc_gives_the_same_text(server: Serving, client: openai.OpenAI, model: str) -> None:
    chat = Chat.of("What is the capital of France?", temperature=0, max_tokens=40)
    with server.grpc() as grpc:
        chunks = list(grpc.stream(model, chat, answer=TextChunk))

    assert "".join(chunk.text for chunk in chunks) == whole(client, model, said(chat.messages[0].text), **GREEDY)[0]
    assert chunks[-1].finish_reason == "stop"
