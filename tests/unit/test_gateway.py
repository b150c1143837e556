"""The gateway by OpenAI's own client, in front of a socket that answers as Envoy and the models behind it do."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from torchserve_dag.archives.signature import signature
from torchserve_dag.direct import http as direct_http
from torchserve_dag.front_door.backend import MODELS
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.front_door.splits import ServedVersion
from torchserve_dag.front_door.tokens import Token, TokenStore
from torchserve_dag.gateway import chat, completions, embeddings, estimate, fields, moderations, responses
from torchserve_dag.gateway.app import GatewayApp
from torchserve_dag.gateway.errors import ApiError
from torchserve_dag.gateway.limits import Spending
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import TOKEN
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import Chat, Prompt, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server.state import State

SERVED = (
    ServedVersion("talk", "1.0", 60.0, ours=True, streams=True, language=("chat", "completion")),
    ServedVersion("vectors", "1.0", 60.0, ours=True, language=("embedding",)),
    ServedVersion("judge", "1.0", 60.0, ours=True, language=("moderation",)),
    ServedVersion("photos", "1.0", 60.0, ours=True),
)
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}


class Model:
    """What answers at Envoy's socket for the gateway: `answers` in turn, each as it is; it keeps what was asked."""

    def __init__(self, root: Path) -> None:
        self.state = State(root)
        self.door = Door(self.state)
        self.door.folder.mkdir(parents=True)
        self.door.begin(Traffic().torchserve, direct=True)
        self.door.change(lambda now: Traffic(now.torchserve, SERVED, sockets={}))
        self.socket = self.door.folder / MODELS
        self.answers: list[bytes] = []
        self.asked: list[tuple[str, Any]] = []
        self.left = 0

    def says(self, *lines: Any, status: str = "200 OK", kind: str = "application/x-ndjson", ends: bool = True) -> None:
        """Answer with a body in chunks, a line in each; `ends`: whether it comes to its end."""
        chunks = [f"{len(line):x}\r\n".encode() + line + b"\r\n" for line in (_line(one) for one in lines)]
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nx-model-version: 1.0\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        self.answers.append(head.encode() + b"".join(chunks) + (b"0\r\n\r\n" if ends else b""))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        self.asked.append((head, json.loads(await reader.readexactly(length))))
        writer.write(self.answers.pop(0))
        if self.answers and self.answers[0] == b"":  # and no more, until the gateway leaves
            with suppress(ConnectionError):
                await reader.read()
            self.left += 1
        writer.close()

    def call(self, *calls: Any, token: str | None = None) -> list[Any]:
        """What OpenAI's client gives for calls, of which each is a function of it; failures as values."""

        async def run() -> list[Any]:
            server = await asyncio.start_unix_server(self.serve, sock=direct_http.listen_at(self.socket))
            transport = httpx.ASGITransport(GatewayApp(self.state).app)
            http = httpx.AsyncClient(transport=transport, headers={TOKEN: token} if token else {})
            found: list[Any] = []
            async with (
                server,
                openai.AsyncOpenAI(base_url="http://v/v1", api_key="k", http_client=http, max_retries=0) as client,
            ):
                for one in calls:
                    try:
                        said = await one(client)
                        found.append([item async for item in said] if isinstance(said, openai.AsyncStream) else said)
                    except openai.OpenAIError as error:
                        found.append(error)
            return found

        return asyncio.run(run())


def _line(said: Any) -> bytes:
    return said if isinstance(said, bytes) else json.dumps(said).encode() + b"\n"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(tmp_path)


def ask(**more: Any) -> Any:
    given: dict[str, Any] = {"model": "talk", "messages": [{"role": "user", "content": "Hello"}], **more}
    return lambda client: client.chat.completions.create(**given)


class TestAnswers:
    def test_a_stream_is_put_together_or_passed_on(self, model: Model) -> None:
        for _ in range(2):
            model.says({"text": "Good"}, {"text": " day", "finish_reason": "length"}, {"usage": USAGE})
        whole, chunks = model.call(ask(), ask(stream=True, stream_options={"include_usage": True}))

        assert whole.choices[0].message.content == "Good day"
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage.total_tokens == 7
        assert [one.choices[0].delta.content for one in chunks[:-1]] == ["Good", " day"]
        assert chunks[-1].usage.completion_tokens == 2
        assert chunks[0].usage is None

    def test_the_model_gets_the_message_and_the_headers_that_routes_go_by(self, model: Model) -> None:
        model.says({"text": "a"}, {"usage": USAGE})
        call = ask(model="talk/1.0:loud", temperature=0, stop=["x"], extra_headers={"x-user-id": "u", "x-outputs": "n"})
        model.call(call, token=TokenStore(model.door.folder).issue("alice", 60) and "alice")
        ((head, body),) = model.asked

        assert head.startswith("POST /predictions/talk/1.0 HTTP/1.1\r\n")
        assert {"x-user-id: u", "x-usage: true", "x-door-token: alice"} <= set(head.split("\r\n"))
        assert "x-outputs" not in head
        assert "authorization" not in head
        assert plain.build(Chat, body) == Chat.of("Hello", temperature=0, stop=["x"], adapter="loud")

    @pytest.mark.parametrize("ends", [True, False])
    def test_an_answer_that_breaks_off_is_an_error(self, model: Model, ends: bool) -> None:  # noqa: FBT001
        """Also one that ends in good order without its usage, as TorchServe ends that of a killed worker."""
        for _ in range(2):
            model.says({"text": "Good"}, ends=ends)
        whole, chunks = model.call(ask(), ask(stream=True))

        assert (type(whole), whole.status_code) == (openai.InternalServerError, 502)
        assert type(chunks) is openai.APIError
        assert "broke off" in str(chunks)

    def test_a_failure_keeps_its_status_and_names_its_field(self, model: Model) -> None:
        failure = {"code": 400, "type": "InputError", "message": "logit_bias: no engine can.", "request_id": "r"}
        model.says(failure, status="400 Bad Request", kind="application/json")
        busy = {"code": 429, "type": "Overloaded", "message": "Too many tokens are in progress."}
        model.says(busy, status="429 Too Many Requests\r\nretry-after: 1", kind="application/json")
        refused, limited = model.call(ask(stream=True), ask())

        assert (type(refused), refused.param) == (openai.BadRequestError, "logit_bias")
        assert (type(limited), limited.code) == (openai.RateLimitError, "rate_limit_exceeded")
        assert limited.response.headers["retry-after"] == "1"

    def test_a_failure_after_the_first_chunk_is_an_event(self, model: Model) -> None:
        failure = {"code": 422, "type": "InputError", "message": "It went wrong."}
        model.says({"text": "Good"}, failure)
        model.says({"text": "Good"}, failure)
        (chat_error, responses_error) = model.call(
            ask(stream=True), lambda client: client.responses.create(model="talk", input="a", stream=True)
        )

        assert [type(chat_error), type(responses_error)] == [openai.APIError, openai.APIError]
        assert "It went wrong." in str(chat_error)
        assert "It went wrong." in str(responses_error)

    @pytest.mark.parametrize(
        ("said", "content"), [("abc", "abc"), ({"text": "abc"}, "abc"), ([{"text": "a"}, {"text": "b"}], "ab")]
    )
    def test_answers_that_are_no_streams(self, model: Model, said: Any, content: str) -> None:
        model.says(said, kind=f"application/json\r\nx-usage: {json.dumps(USAGE)}")
        (whole,) = model.call(ask())

        assert whole.choices[0].message.content == content
        assert whole.usage.prompt_tokens == 5

    def test_parts_of_a_call_of_a_tool_are_put_together(self, model: Model) -> None:
        first = {"function": {"name": "f", "arguments": '{"a"'}, "id": "c", "type": "function", "index": 0}
        lines = [{"text": "", "tool_calls": [first]}]
        lines += [{"text": "", "tool_calls": [{"function": {"arguments": ": 1}"}, "index": 0}]}]
        model.says(*lines, {"text": "", "finish_reason": "tool_calls"}, {"usage": USAGE})
        (whole,) = model.call(ask())
        (call,) = whole.choices[0].message.tool_calls

        assert (call.id, call.function.name, call.function.arguments) == ("c", "f", '{"a": 1}')
        assert whole.choices[0].message.content is None

    def test_vectors_come_as_floats_and_in_base64(self, model: Model) -> None:
        for _ in range(2):
            model.says(
                {"embedding": [0.5, -2.0], "usage": {"prompt_tokens": 3, "total_tokens": 3}}, kind="application/json"
            )
        found = model.call(
            lambda client: client.embeddings.create(model="vectors", input="a"),
            lambda client: client.embeddings.create(model="vectors", input=["a"], encoding_format="float"),
        )

        assert [one.data[0].embedding for one in found] == [[0.5, -2.0]] * 2
        assert [one.usage.prompt_tokens for one in found] == [3, 3]

    def test_texts_are_judged_in_order_by_the_only_model_for_it(self, model: Model) -> None:
        verdicts = [
            {"flagged": flagged, "categories": {"rude": flagged}, "category_scores": {"rude": score}}
            for flagged, score in ((True, 0.75), (False, 0.25))
        ]
        for verdict in (verdicts[1], *verdicts):
            model.says(verdict, kind="application/json")
        one, two = model.call(
            lambda client: client.moderations.create(input="a"),
            lambda client: client.moderations.create(
                model="judge/1.0", input=[{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
            ),
        )

        assert (one.model, one.results[0].flagged, len(one.results)) == ("judge/1.0", False, 1)
        assert one.id.startswith("modr-")
        by_text = dict(zip((body["text"] for _, body in model.asked[1:]), verdicts, strict=True))
        assert [one.flagged for one in two.results] == [by_text[text]["flagged"] for text in "bc"]
        assert two.results[0].categories.model_dump(exclude_unset=True) == by_text["b"]["categories"]
        assert two.results[0].category_scores.model_dump(exclude_unset=True) == by_text["b"]["category_scores"]
        assert [head.split()[1] for head, _ in model.asked] == ["/predictions/judge"] + ["/predictions/judge/1.0"] * 2

    def test_a_model_has_to_be_named_where_there_are_several_to_judge_or_none(self, model: Model) -> None:
        TokenStore(model.door.folder).issue("bob", 60, models=["vectors"])
        (none,) = model.call(lambda client: client.moderations.create(input="a"), token="bob")  # noqa: S106
        more = (*SERVED, ServedVersion("other", "1.0", 60.0, ours=True, language=("moderation",)))
        model.door.change(lambda now: Traffic(now.torchserve, more, sockets={}))
        several, wrong = model.call(
            lambda client: client.moderations.create(input="a"),
            lambda client: client.moderations.create(input="a", model="talk"),
        )

        assert [(one.status_code, one.param) for one in (none, several, wrong)] == [(400, "model")] * 3
        assert "none is served for /v1/moderations" in str(none)
        assert "write one of judge, other" in str(several)
        assert "not at /v1/moderations" in str(wrong)

    def test_without_a_way_to_the_models_it_says_so(self, model: Model) -> None:
        self_closed = model.call(lambda client: client.models.list())
        assert [one.id for one in self_closed[0].data] == ["judge", "talk", "vectors"]

        model.answers = [b""]
        (broken,) = model.call(ask())
        assert broken.status_code == 502


class TestLimits:
    def test_a_token_is_counted_as_its_answers_say(self, model: Model) -> None:
        TokenStore(model.door.folder).issue("alice", 60, tokens_per_minute=100)
        model.says({"text": "a"}, {"usage": {"prompt_tokens": 60, "completion_tokens": 30, "total_tokens": 90}})
        _, over, never = model.call(ask(max_tokens=50), ask(max_tokens=90), ask(max_tokens=100), token="alice")  # noqa: S106

        assert (type(over), over.response.headers["x-ratelimit-limit-tokens"]) == (openai.RateLimitError, "100")
        assert 0 < int(over.response.headers["retry-after"]) <= 60
        assert never.response.headers["x-should-retry"] == "false"

    def test_what_is_refused_or_never_ran_costs_nothing(self, model: Model) -> None:
        TokenStore(model.door.folder).issue("alice", 60, tokens_per_minute=100)
        failure = {"code": 400, "type": "InputError", "message": "No."}
        for _ in range(3):
            model.says(failure, status="400 Bad Request", kind="application/json")
        found = model.call(*(ask(max_tokens=90) for _ in range(3)), token="alice")  # noqa: S106

        assert [type(one) for one in found] == [openai.BadRequestError] * 3

    def test_a_token_sees_and_calls_its_models_only(self, model: Model) -> None:
        TokenStore(model.door.folder).issue("bob", 60, models=["vectors"])
        listed, refused, revoked = [
            *model.call(lambda client: client.models.list(), ask(), token="bob"),  # noqa: S106
            *model.call(ask(), token="carol"),  # noqa: S106
        ]

        assert [one.id for one in listed.data] == ["vectors"]
        assert (type(refused), refused.code) == (openai.PermissionDeniedError, "model_not_allowed")
        assert "revoked" in str(revoked)

    def test_what_is_used_is_forgotten_evenly_and_outlives_the_process(self, tmp_path: Path) -> None:
        now, token = [1000.0], Token("alice", "id", 0, tokens_per_minute=600)
        spending = Spending(tmp_path / "used", lambda: now[0])
        reservation = spending.reserve(token, 600)
        assert reservation
        with pytest.raises(ApiError, match=r"try again in 1 s"):
            spending.reserve(token, 10)
        now[0] += 30
        reservation.settle(700)
        reservation.settle(0)
        again = Spending(tmp_path / "used", lambda: now[0])

        assert again.used("id", 600) == 400
        assert again.reserve(token, 200)
        assert Spending(tmp_path / "used", lambda: now[0] + 61).used("id", 600) == 0

    def test_a_count_that_cannot_be_read_is_begun_anew(self, tmp_path: Path) -> None:
        (tmp_path / "used").write_bytes(b"no database, but long enough to look like one" * 100)

        assert Spending(tmp_path / "used").used("id", 600) == 0


@pytest.mark.parametrize(
    ("takes", "gives", "language"),
    [
        ("Chat", "Iterator[TextChunk]", ["chat"]),
        ("Chat | Prompt", "Iterator[Text]", ["chat", "completion"]),
        ("Prompt", "str", ["completion"]),
        ("Chat", "list[TextChunk]", ["chat"]),
        ("Chat", "Labels", []),
        ("Text", "Iterator[Text]", []),
        ("Text", "Embedding", ["embedding"]),
        ("Chat", "Embedding", []),
        ("Text", "Moderation", ["moderation"]),
        ("Chat", "Moderation", []),
    ],
)
def test_an_archive_says_what_it_may_be_asked(tmp_path: Path, takes: str, gives: str, language: list[str]) -> None:
    (tmp_path / "workflows").mkdir()
    names = "Chat, Embedding, Labels, Moderation, Prompt, Text, TextChunk"
    code = f"from collections.abc import Iterator\nfrom torchserve_dag import {names}\n"
    (tmp_path / "workflows/a.py").write_text(f"{code}def run(asked: {takes}) -> {gives}:\n    {_BODY[gives[:8]]}\n")
    text = 'name: a\nversion: "1"\ndoes: It.\nnodes: {run: {function: run}}\noutput: run\n'
    (tmp_path / "workflows/a.yaml").write_text(text)

    assert signature(read_graph(Project(tmp_path), tmp_path / "workflows/a.yaml"))["language"] == language


_BODY = defaultdict(lambda: "raise NotImplementedError", {"Iterator": "yield from ()"})


class TestRequests:
    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({"top_k": 3}, "top_k"),
            ({"functions": []}, "functions"),
            ({"adapter": "a"}, "adapter"),
            ({"store": True}, "store"),
            ({"modalities": ["audio"]}, "modalities"),
            ({"temperature": 3}, "temperature"),
            ({"max_tokens": "many"}, "max_tokens"),
            ({"n": 10**9}, "n"),
            ({"stop": ["x"] * 10_000}, "stop"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "friend", "content": "a"}]}, "messages[0].role"),
            ({"response_format": {"type": "json_schema"}}, "response_format"),
            ({"tools": [{"type": "custom"}]}, "tools[0].type"),
        ],
    )
    def test_a_field_that_is_unknown_or_wrong_is_named(self, given: dict[str, Any], param: str) -> None:
        with pytest.raises(ApiError) as refused:
            chat.read({"messages": [{"role": "user", "content": "a"}], **given})

        assert (refused.value.status, refused.value.param) == (400, param)

    def test_an_answer_can_be_sent_back(self) -> None:
        """Clients send an earlier answer as they got it, with keys that are null."""
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        message = {"role": "assistant", "content": None, "refusal": None, "audio": None, "tool_calls": [call]}
        read = chat.read({"messages": [message, {"role": "tool", "tool_call_id": "c", "content": "4"}], "user": "u"})

        assert read.messages[0].tool_calls
        assert read.messages[0].tool_calls[0].function.name == "f"

    @pytest.mark.parametrize(
        "body", [b"{", b"[]", b'{"temperature": NaN}', b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 10_000]
    )
    def test_a_body_that_is_no_json_object_is_refused(self, body: bytes) -> None:
        with pytest.raises(ApiError) as refused:
            fields.read_json(body)

        assert refused.value.status == 400

    def test_prompts_and_texts_are_read_one_by_one(self) -> None:
        assert completions.read({"prompt": ["a", "b"], "seed": 1}) == [
            Prompt(prompt="a", seed=1),
            Prompt(prompt="b", seed=1),
        ]
        assert embeddings.read({"input": ["a", "b"]}).input == [Text("a"), Text("b")]
        for read, given in ((completions.read, {"prompt": [1, 2]}), (embeddings.read, {"input": [[1]]})):
            with pytest.raises(ApiError, match="not read"):
                read(given)

    @pytest.mark.parametrize(
        ("given", "param"),
        [
            ({}, "input"),
            ({"input": []}, "input"),
            ({"input": ["a", 3]}, "input"),
            ({"input": [{"type": "image_url", "image_url": {"url": "data:"}}]}, "input"),
            ({"input": ["a"] * (moderations.MAX_TEXTS + 1)}, "input"),
            ({"input": "a", "threshold": 0.1}, "threshold"),
        ],
    )
    def test_what_cannot_be_judged_is_named(self, given: dict[str, Any], param: str) -> None:
        with pytest.raises(ApiError) as refused:
            moderations.read(given)

        assert (refused.value.status, refused.value.param) == (400, param)

    def test_a_response_is_a_chat(self) -> None:
        photo = {"type": "input_image", "image_url": "data:image/png;base64,AA==", "detail": "low"}
        schema = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
        read = responses.read(
            {
                "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}, photo]}],
                "instructions": "Be brief.",
                "max_output_tokens": 9,
                "text": {"format": schema},
            }
        )

        assert [message.role for message in read.messages] == ["system", "user"]
        assert read.most_tokens == 9
        assert read.response_format
        assert read.response_format.type == "json_schema"

    @pytest.mark.parametrize(
        "given", [{"store": True}, {"previous_response_id": "r"}, {"reasoning": {}}, {"input": []}]
    )
    def test_what_responses_cannot_do_is_named(self, given: dict[str, Any]) -> None:
        with pytest.raises(ApiError) as refused:
            responses.read({"input": "a", **given})

        assert refused.value.param == next(iter(given))

    def test_photos_are_not_counted_by_their_bytes(self) -> None:
        part = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 1_000_000}}
        read = chat.read({"messages": [{"role": "user", "content": [{"type": "text", "text": "a" * 400}, part]}]})

        assert estimate.prompt_tokens(read) == 100 + estimate.PHOTO
        assert estimate.answer_tokens(read) == estimate.ANSWER
