"""Requests and answers are kept only where a workflow's file says so: in one file, within its size, redacted."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import Write
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.engine.answered import AnsweredRequest
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import (
    Chat,
    ChatMessage,
    Failure,
    FunctionCall,
    Text,
    TextChunk,
    ToolCall,
)
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.telemetry import conversations
from torchserve_dag.runtime.telemetry.conversations import Conversations, KeptCounts
from torchserve_dag.runtime.telemetry.plain_request import MAX_TEXT
from torchserve_dag.runtime.worker.protocol import ServiceRequest, ServiceResponse
from torchserve_dag.runtime.worker.service import WorkflowService, load
from torchserve_dag.runtime.worker.torchserve import segments

FUNCTIONS = """
from collections.abc import Iterator

def shout(text: Text) -> Text:
    if text.text == "bad": raise InputError("That text is bad.", 422)
    return Text(text.text.upper())

def spell(text: Text) -> Iterator[Text]:
    for letter in text.text:
        yield Text(letter)

def redact(text: str) -> str:
    if text == "trouble": raise RuntimeError(f"secret {text}")
    return text.replace("Ada", "[name]").replace("ADA", "[name]")

def number(text: str) -> str:
    return len(text)

def wrong(text: str, more: str) -> str:
    return text
"""

Serve = Callable[..., WorkflowService]


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of logs, as both hosts name it to their workers."""
    folder = tmp_path / "logs"
    folder.mkdir()
    monkeypatch.setenv(conversations.FOLDER, str(folder))
    return folder


@pytest.fixture
def serve(write: Write, project: Path, logs: Path) -> Iterator[Serve]:
    """Serves a workflow of one function, with a `keep`."""
    services: list[WorkflowService] = []

    def served(keep: str | None = "{redact: redact}", function: str = "shout") -> WorkflowService:
        write(f"answer: {{function: {function}}}", FUNCTIONS, more=f"serve: {{keep: {keep}}}\n" if keep else "")
        (project / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml"}))
        services.append(load(project, None))  # type: ignore[arg-type]
        return services[-1]

    yield served
    for service in services:
        service.close()


def ask(service: WorkflowService, *texts: str) -> list[ServiceResponse]:
    return [service.submit(ServiceRequest(f"id-{text}"[:20], text.encode())).result(20) for text in texts]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_nothing_is_kept_unless_the_workflows_file_says_so(serve: Serve, logs: Path) -> None:
    service = serve(None)
    ask(service, "Ada")
    service.close()

    assert list(logs.iterdir()) == []
    assert not [name for _, name, _ in service.metrics() if "kept" in name]


def test_a_request_is_a_line_with_its_answer_each_text_redacted(serve: Serve, logs: Path) -> None:
    service = serve()
    ask(service, "Ada and Bo", "bad")
    service.close()

    first, second = lines(logs / "conversations.jsonl")
    assert first.pop("time") <= second.pop("time")
    assert first == {
        "request_id": "id-Ada and Bo", "workflow": "flow", "version": "1.0",
        "message": {"text": "[name] and Bo"}, "answer": {"text": "[name] AND BO"},
    }  # fmt: skip
    assert second["failure"] == {"status": 422, "type": "InputError", "message": "That text is bad."}
    assert "answer" not in second
    assert stat.S_IMODE((logs / "conversations.jsonl").stat().st_mode) == 0o600
    assert service.metrics()["", "torchserve_dag_kept_total", ()] == 2


@pytest.mark.parametrize("in_chunks", [True, False])
def test_a_name_that_is_split_between_chunks_is_redacted_too(serve: Serve, logs: Path, *, in_chunks: bool) -> None:
    service, sent = serve(function="spell"), list[bytes]()

    def send(body: bytes, _: str, taken: Callable[[], None]) -> None:
        sent.append(body)
        taken()

    service.submit(ServiceRequest("id", b"I, Ada"), send if in_chunks else None).result(20)
    service.close()

    assert b"".join(sent) == (b"I, Ada" if in_chunks else b"")
    assert [line["answer"] for line in lines(logs / "conversations.jsonl")] == ["I, [name]"]


def test_what_redact_raises_for_is_not_kept_and_counted_and_logged(
    serve: Serve, logs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = serve()
    assert json.loads(ask(service, "trouble", "Bo")[0].body) == {"text": "TROUBLE"}
    service.close()

    assert [line["message"]["text"] for line in lines(logs / "conversations.jsonl")] == ["Bo"]
    assert service.metrics()["", "torchserve_dag_not_kept_total", (("reason", "redact"),)] == 1
    assert "request id-trouble: it is not kept" in caplog.text
    assert "NotKeptError: RuntimeError" in caplog.text
    assert "secret trouble" not in caplog.text


def test_what_redact_gives_has_to_be_text(serve: Serve, logs: Path) -> None:
    service = serve("{redact: number}")
    ask(service, "Ada")
    service.close()

    assert list(logs.iterdir()) == []
    assert service.metrics()["", "torchserve_dag_not_kept_total", (("reason", "redact"),)] == 1


def test_a_request_whose_message_cannot_be_read_is_not_kept(serve: Serve, logs: Path) -> None:
    service = serve()
    assert service.submit(ServiceRequest("id", b"\xff")).result(20).status == 400
    service.close()

    assert list(logs.iterdir()) == []


def test_an_absolute_path_needs_no_folder_of_logs(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(conversations.FOLDER)
    service = serve(f"{{file: {tmp_path}/elsewhere.jsonl}}")
    ask(service, "Ada")
    service.close()

    assert [line["message"] for line in lines(tmp_path / "elsewhere.jsonl")] == [{"text": "Ada"}]


def test_without_a_folder_of_logs_nothing_is_kept_and_the_log_says_so(
    serve: Serve, logs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(conversations.FOLDER)
    service = serve()
    ask(service, "Ada")
    service.close()

    assert list(logs.iterdir()) == []
    assert "flow: nothing is kept in conversations.jsonl" in caplog.text


@pytest.mark.parametrize(
    ("keep", "what"),
    [
        ("{redact: censor}", 'serve: keep: redact: .*flow.py has no function "censor"'),
        ("{redact: wrong}", "serve: keep: redact: wrong does not take a text and give one"),
        ("{megabytes: 0}", "megabytes is at least 1"),
        ("{file: ../up.jsonl}", '"../up.jsonl" is not a name or an absolute path that ends with .jsonl'),
        ("{file: scores.log}", '"scores.log" is not a name'),
    ],
)
def test_what_is_wrong_with_keep_is_found_by_check(write: Write, project: Path, keep: str, what: str) -> None:
    path = write("answer: {function: shout}", FUNCTIONS, more=f"serve: {{keep: {keep}}}\n")

    with pytest.raises(CheckError, match=what) as error:
        read_graph(Project(project), path)

    assert [problem.line for problem in error.value.problems] == [7]


def test_the_file_with_redact_belongs_to_the_workflow_where_no_node_needs_it(write: Write, project: Path) -> None:
    path = write("answer: {handler: upper}", FUNCTIONS, more="serve: {keep: {redact: redact}}\n")

    assert project / "workflows" / "flow.py" in read_graph(Project(project), path).files


def test_a_handler_has_the_function_in_its_own_file(project: Path) -> None:
    handler = project / "handlers" / "upper"
    with handler.with_suffix(".py").open("a") as code:
        code.write("\ndef hide(text: str) -> str:\n    return '…'\n")
    with handler.with_suffix(".yaml").open("a") as file:
        file.write("serve: {keep: {redact: hide}}\n")
    graph = read_graph(Project(project), handler.with_suffix(".yaml"))

    assert graph.redact
    assert graph.redact("Ada") == "…"


# The file itself.


def answered(number: int, text: str = "Hello", answer: Any = None) -> AnsweredRequest:
    return AnsweredRequest(f"id-{number}", Text(text), (), answer or Text("Hi"))


def test_the_file_keeps_its_size_and_what_is_newest(tmp_path: Path) -> None:
    file, limit = tmp_path / "kept.jsonl", 10_000
    writer = Conversations(file, "flow", "1.0", limit)
    for number in range(1_000):
        writer.keep(answered(number))
    writer.close()

    older, newer = lines(tmp_path / "kept.1.jsonl"), lines(file)
    numbers = [int(line["request_id"].removeprefix("id-")) for line in older + newer]
    assert numbers == list(range(numbers[0], 1_000))
    assert limit / 2 < sum(path.stat().st_size for path in tmp_path.iterdir()) <= limit
    assert writer.counts() == KeptCounts(kept=1_000)


def test_workers_that_share_a_file_mix_no_lines_and_rotate_it_once_at_a_time(tmp_path: Path) -> None:
    file, limit = tmp_path / "kept.jsonl", 10_000
    writers = [Conversations(file, name, "1.0", limit) for name in ("one", "two", "three")]
    for number in range(300):
        for writer in writers:
            writer.keep(answered(number))
    for writer in writers:
        writer.close()

    assert lines(tmp_path / "kept.1.jsonl") + lines(file)
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert limit / 2 - 500 < size <= limit + 3 * 500  # had it been rotated twice at once, a half would be gone
    assert [writer.counts().kept for writer in writers] == [300] * 3


def test_a_slow_disk_delays_no_request_what_does_not_fit_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversations, "MAX_WAITING", 1_000)
    begun, go_on = threading.Event(), threading.Event()

    def slow(text: str) -> str:
        begun.set()
        go_on.wait(30)
        return text

    writer = Conversations(tmp_path / "kept.jsonl", "flow", "1.0", 10**6, slow)
    writer.keep(answered(0))
    assert begun.wait(30)
    for number in range(1, 100):
        writer.keep(answered(number))
    dropped = writer.counts().busy
    go_on.set()
    writer.close()

    kept = len(lines(tmp_path / "kept.jsonl"))
    assert 1 < kept < 10
    assert dropped == 100 - kept
    assert writer.counts() == KeptCounts(kept=kept, busy=dropped)


def test_a_disk_that_refuses_is_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = Conversations(tmp_path / "missing" / "kept.jsonl", "flow", "1.0", 10**6)
    writer.keep(answered(1))
    writer.close()

    assert writer.counts() == KeptCounts(unwritable=1)
    assert "request id-1: it is not kept" in caplog.text


def kept(tmp_path: Path, message: Any, answer: Any, *chunks: Any) -> dict[str, Any]:
    writer = Conversations(tmp_path / "kept.jsonl", "flow", "1.0", 10**6)
    writer.keep(AnsweredRequest("id", message, chunks, answer))
    writer.close()
    (line,) = lines(tmp_path / "kept.jsonl")
    return line


def test_images_and_bytes_are_named_and_long_texts_cut(tmp_path: Path) -> None:
    line = kept(tmp_path, {"image": object(), "file": b"12345"}, Text("a" * (MAX_TEXT + 1)))

    assert line["message"] == {"image": "<object>", "file": "<5 bytes>"}
    assert line["answer"] == {"text": "a" * MAX_TEXT + "…"}


def test_a_chat_is_kept_with_its_answers_side_by_side_and_the_calls_of_tools(tmp_path: Path) -> None:
    chat = Chat(messages=[ChatMessage("user", "Hello")], n=2)
    call = [
        ToolCall(FunctionCall("weather", '{"ci'), index=0),
        ToolCall(FunctionCall(arguments='ty": "Bern"}'), index=0),
    ]
    line = kept(
        tmp_path, chat, [],
        TextChunk("Hi"), TextChunk("", index=1, tool_calls=call[:1]), TextChunk("!"),
        TextChunk("", index=1, tool_calls=call[1:], finish_reason="tool_calls"),
    )  # fmt: skip

    assert line["message"]["messages"] == [{"role": "user", "content": "Hello"}]
    assert line["answer"] == [
        "Hi!",
        {"text": "", "tool_calls": [{"name": "weather", "arguments": '{"city": "Bern"}'}]},
    ]


def test_an_answer_that_breaks_off_is_kept_with_its_failure(tmp_path: Path) -> None:
    line = kept(tmp_path, Text("Hello"), Failure(504, "It took longer.", "Timeout"), TextChunk("On"), TextChunk("ce"))

    assert (line["answer"], line["failure"]["status"]) == ("Once", 504)


def test_a_part_of_a_war_keeps_nothing(write: Write, project: Path, logs: Path) -> None:
    write("answer: {handler: upper}", FUNCTIONS, more="serve: {keep: {redact: redact}}\n")
    (project / "build.json").write_text(json.dumps({"file": "workflows/flow.yaml", "segment": "answer"}))
    service = segments.load(project, None)
    assert service.submit(ServiceRequest("id", b"Ada")).result(20).status == 200
    service.close()

    assert list(logs.iterdir()) == []
