"""OpenAI's API at `/v1` of a real server, called by OpenAI's own client, untouched."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.live.conftest import Serving, run_tool, serve_files
from tests.live.openai_access import WITHIN_S, Access, said
from torchserve_dag.front_door.start import own_token
from torchserve_dag.server.supervised import Supervised

FILES: dict[str, str | Path] = {
    "workflows/talk.yaml": """
        name: talk
        version: "1.0"
        does: Says the last message word by word.
        nodes: {talk: {function: talk}}
        output: talk
        serve: {timeout_s: 60}
        """,
    "workflows/talk.py": """
        import os
        import time
        from collections.abc import Iterator
        from pathlib import Path
        from torchserve_dag import Chat, InputError, Prompt, TextChunk
        from torchserve_dag.runtime.messages import FunctionCall, TokenLogprob, ToolCall

        def talk(asked: Chat | Prompt) -> Iterator[TextChunk]:
            said = asked.messages[-1].text if isinstance(asked, Chat) else asked.prompt
            if said.startswith("gate "):
                yield from through(Path(said.removeprefix("gate ")))
                return
            if said.startswith("repeat "):
                for _ in range(int(said.removeprefix("repeat "))):
                    yield TextChunk("so ")
                return
            if said == "die":
                yield TextChunk("I am dying")
                time.sleep(0.5)
                os._exit(1)
            if said == "refuse":
                raise InputError("temperature: the engine cannot do that.", 400)
            if said == "fail later":
                yield TextChunk("So far")
                raise InputError("It went wrong later.", 422)
            if isinstance(asked, Chat) and asked.tools:
                name = asked.tools[0].function.name
                yield TextChunk(tool_calls=[ToolCall(FunctionCall(name, '{"city":'), "call_7", "function", 0)])
                end = [ToolCall(FunctionCall(None, ' "Oslo"}'), index=0)]
                yield TextChunk(tool_calls=end, finish_reason="tool_calls")
                return
            limit = asked.most_tokens or 1000
            for index in range(asked.n or 1):
                words = said.split()
                for at, word in enumerate(words[:limit]):
                    last = at + 1 == min(len(words), limit)
                    reason = ("stop" if len(words) <= limit else "length") if last else None
                    text = word if at == 0 else " " + word
                    logprobs = [TokenLogprob(text, -0.5, [TokenLogprob("x", -1.0)])] if asked.logprobs else None
                    engine = f"function {asked.adapter or ''}".strip() if last else None
                    yield TextChunk(text, index, reason, logprobs=logprobs, served_by=engine)

        def through(gate: Path) -> Iterator[TextChunk]:
            yield TextChunk("begun")
            try:
                while not gate.exists():
                    time.sleep(0.01)
                    yield TextChunk(" tick")
            finally:
                gate.with_name(gate.name + ".left").touch()
        """,
    "workflows/plain.yaml": """
        name: plain
        version: "1.0"
        does: Says the last message loudly, in texts that end without a reason.
        nodes: {say: {function: say}}
        output: say
        """,
    "workflows/plain.py": """
        from collections.abc import Iterator
        from torchserve_dag import Chat, Text

        def say(chat: Chat) -> Iterator[Text]:
            for word in chat.messages[-1].text.split():
                yield Text(word.upper() + " ")
        """,
    "workflows/whole.yaml": """
        name: whole
        version: "1.0"
        does: Says the last message in one piece.
        nodes: {say: {function: say}}
        output: say
        """,
    "workflows/whole.py": """
        from torchserve_dag import Chat

        def say(chat: Chat) -> str:
            return chat.messages[-1].text[::-1]
        """,
    "workflows/vectors.yaml": """
        name: vectors
        version: "1.0"
        does: Makes a vector of a text.
        nodes: {embed: {function: embed}}
        output: embed
        """,
    "workflows/vectors.py": """
        from torchserve_dag import Embedding, Text, Usage

        def embed(text: Text) -> Embedding:
            return Embedding([float(len(text.text)), 0.25, -1.5], Usage.of(len(text.text.split())))
        """,
    "workflows/judge.yaml": """
        name: judge
        version: "1.0"
        does: Flags a text that shouts.
        nodes: {judge: {function: judge}}
        output: judge
        """,
    "workflows/judge.py": """
        from torchserve_dag import Moderation, Text

        def judge(text: Text) -> Moderation:
            loud = text.text.isupper()
            return Moderation(loud, {"loud": loud}, {"loud": float(loud)})
        """,
}

HOSTS = ("direct", "torchserve")
direct_only = pytest.mark.parametrize("server", ["direct"], indirect=True)


@pytest.fixture(scope="module", params=HOSTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    yield from serve_files(request, tmp_path_factory.mktemp("gateway"), request.param)


@pytest.fixture
def access(server: Serving) -> Access:
    return Access(server, own_token(server.state))


@pytest.fixture
def client(access: Access) -> Iterator[openai.OpenAI]:
    with access.sync() as found:
        yield found


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not what():
        assert time.monotonic() < deadline, "not within the limit"
        time.sleep(0.05)


def new_token(server: Serving, *words: str) -> str:
    return run_tool(server.root, "token", "new", f"t{time.monotonic_ns()}", *words).strip()


def test_a_chat_is_answered_whole_and_in_chunks(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="talk", messages=said("once upon a time"), n=2)
    chunks = list(client.chat.completions.create(model="talk/1.0", messages=said("once upon a time"), stream=True))

    assert [(one.index, one.message.content, one.finish_reason) for one in whole.choices] == [
        (0, "once upon a time", "stop"),
        (1, "once upon a time", "stop"),
    ]
    assert whole.model == "talk/1.0"
    assert whole.usage
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == "once upon a time"
    assert [one.choices[0].finish_reason for one in chunks] == [None, None, None, "stop"]


def test_the_async_client_gets_the_same(access: Access) -> None:
    async def ask() -> list[Any]:
        http = httpx.AsyncClient(verify=access.trust, timeout=WITHIN_S)
        url = f"{access.root}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=access.token, http_client=http, max_retries=0) as client:
            create = client.chat.completions.create
            wanted: Any = {"include_usage": True}
            stream = await create(model="talk", messages=said("a b"), stream=True, stream_options=wanted)
            chunks = [one async for one in stream]
            vectors = await client.embeddings.create(model="vectors", input=["a", "bc"])
            return [chunks, vectors]

    chunks, vectors = asyncio.run(ask())

    assert [one.choices[0].delta.content for one in chunks[:-1]] == ["a", " b"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage
    assert [one.embedding[0] for one in vectors.data] == [1.0, 2.0]
    assert vectors.usage.prompt_tokens == 2


def test_texts_and_whole_answers_are_chats_too(client: openai.OpenAI) -> None:
    """A workflow need not know of chunks: it takes a Chat, and gives text."""
    chunks = list(client.chat.completions.create(model="plain", messages=said("a b"), stream=True))
    (whole,) = client.chat.completions.create(model="whole", messages=said("abc")).choices

    assert [one.choices[0].delta.content for one in chunks] == ["A ", "B ", None]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert (whole.message.content, whole.finish_reason) == ("cba", "stop")


def test_texts_are_judged_by_a_model_that_needs_no_name(client: openai.OpenAI) -> None:
    found = client.moderations.create(input=["hello", "HELLO", "hello"])
    named = client.moderations.create(model="judge/1.0", input="HELLO")

    assert [one.flagged for one in found.results] == [False, True, False]
    assert (found.model, named.model, named.results[0].flagged) == ("judge/1.0", "judge/1.0", True)
    assert named.results[0].category_scores.model_dump(exclude_unset=True) == {"loud": 1.0}


def test_completions_responses_and_embeddings(client: openai.OpenAI) -> None:
    completions = client.completions.create(model="talk", prompt=["a b", "c"], max_tokens=1, logprobs=1)
    events = list(client.responses.create(model="talk", input="a b", instructions="Speak.", stream=True))
    response = client.responses.create(model="talk", input=said("a b c"), max_output_tokens=2)
    floats = client.embeddings.create(model="vectors", input="four", encoding_format="float")
    encoded = client.embeddings.create(model="vectors", input="four")

    assert [(one.text, one.finish_reason) for one in completions.choices] == [("a", "length"), ("c", "stop")]
    assert completions.choices[0].logprobs
    assert completions.choices[0].logprobs.token_logprobs == [-0.5]
    assert [one.type for one in events if one.type != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert (response.output_text, response.status) == ("a b", "incomplete")
    assert floats.data[0].embedding == encoded.data[0].embedding == [4.0, 0.25, -1.5]


def test_tools_and_adapters_reach_the_model(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    (choice,) = client.chat.completions.create(model="talk", messages=said("Oslo?"), tools=tools).choices
    adapted = client.chat.completions.create(model="talk:loud", messages=said("a"))

    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert (call.id, call.function.name, call.function.arguments) == ("call_7", "weather", '{"city": "Oslo"}')
    assert (adapted.model, adapted.system_fingerprint) == ("talk/1.0:loud", "function loud")


def test_models_are_those_that_speak(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["judge", "plain", "talk", "vectors", "whole"]
    assert client.models.retrieve("talk").created > 0
    with pytest.raises(openai.NotFoundError, match='did you mean "talk"'):
        client.chat.completions.create(model="tolk", messages=said("a"))
    with pytest.raises(openai.BadRequestError, match="called at /v1/embeddings"):
        client.chat.completions.create(model="vectors", messages=said("a"))


def test_failures_have_openais_form_and_their_status(client: openai.OpenAI, access: Access) -> None:
    with pytest.raises(openai.BadRequestError, match="the engine cannot do that") as refused:
        client.chat.completions.create(model="talk", messages=said("refuse"))
    with pytest.raises(openai.UnprocessableEntityError, match="went wrong later"):
        client.chat.completions.create(model="talk", messages=said("fail later"))
    chunks = client.chat.completions.create(model="talk", messages=said("fail later"), stream=True)
    with pytest.raises(openai.APIError, match="went wrong later"):
        list(chunks)
    with access.plain() as http:
        without = http.get("/v1/models", headers={"authorization": ""})

    assert refused.value.param == "temperature"
    assert refused.value.request_id
    assert without.status_code == 401
    assert set(without.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_ends_the_models_work(client: openai.OpenAI, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    chunks = client.chat.completions.create(model="talk", messages=said(f"gate {gate}"), stream=True)
    assert next(iter(chunks)).choices[0].delta.content == "begun"
    chunks.close()

    until(gate.with_name("gate.left").exists)
    assert not gate.exists()


def test_a_token_with_limits_calls_models_by_v1_only(server: Serving) -> None:
    limited = Access(server, new_token(server, "--tokens-per-minute", "1000", "--models", "plain,talk"))
    with limited.sync() as client, limited.plain() as http:
        answer = client.chat.completions.with_raw_response.create(model="talk", messages=said("a b"), max_tokens=5)
        names = [one.id for one in client.models.list()]
        with pytest.raises(openai.PermissionDeniedError, match="may call plain, talk, not whole"):
            client.chat.completions.create(model="whole", messages=said("a"))
        elsewhere = [http.post(path, content="a") for path in ("/predictions/whole", "/v2/models/whole/infer")]

    assert names == ["plain", "talk"]
    assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
    assert {(one.status_code, one.json()["message"].partition(",")[0]) for one in elsewhere} == {
        (403, "This token calls language models at /v1 only")
    }


@direct_only
def test_the_count_of_tokens_outlives_the_gateway(server: Serving) -> None:
    limited = Access(server, new_token(server, "--tokens-per-minute", "100"))
    supervised = Supervised(server.state)
    with limited.sync() as client:
        create = client.chat.completions.create
        create(model="talk", messages=said("repeat 9000"), max_tokens=1)  # which are forgotten after 90 minutes
        with pytest.raises(openai.RateLimitError) as over:
            create(model="talk", messages=said("a"), max_tokens=1)
        before = supervised.process("gateway")
        assert before
        os.kill(before.pid, signal.SIGKILL)
        until(lambda: (now := supervised.process("gateway")) and now.pid != before.pid)
        until(lambda: not supervised.problem("gateway"))
        with pytest.raises(openai.RateLimitError) as still:
            create(model="talk", messages=said("a"), max_tokens=1)
        with pytest.raises(openai.RateLimitError, match="its limit is 100 a minute") as never:
            create(model="talk", messages=said("a"), max_tokens=1001)

    assert int(over.value.response.headers["retry-after"]) > 60
    assert over.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
    assert still.value.code == "rate_limit_exceeded"
    assert never.value.response.headers["x-should-retry"] == "false"


@direct_only
def test_a_worker_that_dies_in_mid_answer_is_an_error_event(client: openai.OpenAI) -> None:
    chunks = client.chat.completions.create(model="talk", messages=said("die"), stream=True)
    assert next(iter(chunks)).choices[0].delta.content == "I am dying"
    with pytest.raises(openai.APIError, match="broke off"):
        list(chunks)

    until(lambda: _answers(client))


def _answers(client: openai.OpenAI) -> bool:
    try:
        return bool(client.chat.completions.create(model="talk", messages=said("a")).choices)
    except openai.InternalServerError:
        return False
