"""The workflow chat_with_fallback, while what it asks misbehaves: who answers, what the client gets, and who is asked."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.engines.written import until
from tests.tiny_llama import chat_prompt, greedy_text, make_gguf, make_llama
from tests.unit.openai_server import WORDS, OpenAiServer
from torchserve_dag import Chat, FailedError, TextChunk, Workflow

ROOT = Path(__file__).parents[2]
FILE = ROOT / "workflows" / "chat_with_fallback.yaml"
HANDLER = {"version": "1.0", "code": "text_generation.py"}
CARD = {"does": "It writes.", "input": "A chat.", "output": "A text.", "limits": "A test.", "weights": []}
OWN = {"engine": "openvino", "model": "gguf/llama.gguf", "exact": True, "context": 256, "max_tokens": 16}
ANSWER = "".join(WORDS)
HOSTED, LARGE, SMALL, CANNED = "remote capital-2", "own large model", "openvino llama", "canned answer"
TOO_LONG = "word " * 300
"""For the small model's context, so that it refuses."""
SOON_S = 30.0
"""Less than half of what a silent server takes: whoever has not waited for it is done by then, on any machine."""


@dataclass
class Fallback:
    """The workflow with its hosted model and its large one on servers of their own, and a tiny one of its own."""

    workflow: Workflow
    hosted: OpenAiServer
    large: OpenAiServer

    def ask(self, text: str = "The capital?", **sampling: Any) -> list[TextChunk]:
        return list(self.workflow.stream(Chat.of(text, **sampling)))

    def who(self, text: str = "The capital?") -> str | None:
        return self.ask(text)[-1].served_by

    @property
    def asked(self) -> tuple[int, int, int, int]:
        """How many requests came to each of the four."""
        counts = self.workflow.counts()
        own = [counts[f"answer.fallback_{i}"].items for i in (2, 3)]
        return len(self.hosted.bodies), len(self.large.bodies), own[0], own[1]


Load = Callable[..., Fallback]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_gguf(folder / "gguf", make_llama(folder / "llama"), half=True)
    return folder


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[OpenAiServer, OpenAiServer]]:
    with OpenAiServer() as hosted, OpenAiServer() as large:
        yield hosted, large


@pytest.fixture
def load(servers: tuple[OpenAiServer, OpenAiServer], llama: Path, tmp_path: Path) -> Iterator[Load]:
    """Loads the project's own file, with changes to its node and to the settings of the hosted model."""
    opened: list[Workflow] = []
    hosted, large = servers
    for server, fault in ((hosted, None), (large, "")):
        server.fault = fault
        server.bodies.clear()
        server.times.clear()

    def load_workflow(node: dict[str, Any] | None = None, **remote: Any) -> Fallback:
        for name in ("handlers", "workflows"):
            (tmp_path / name).mkdir()
        shutil.copy(ROOT / "handlers" / "text_generation.py", tmp_path / "handlers")
        shutil.copy(FILE.with_suffix(".py"), tmp_path / "workflows")
        (tmp_path / "weights").symlink_to(llama)
        there = {"url": hosted.url, "retries": 0, "timeout_s": 59} | remote
        settings = {
            "hosted_generation": {"engine": "remote", "model": "capital", "max_tokens": 16, "remote": there},
            "large_generation": {
                "engine": "remote",
                "model": "capital",
                "served_as": LARGE,
                "remote": {"url": large.url, "retries": 0},
            },
            "text_generation": OWN,
        }
        for name, values in settings.items():
            text = yaml.safe_dump({"name": name, **HANDLER, "settings": values, "card": CARD})
            (tmp_path / "handlers" / f"{name}.yaml").write_text(text)
        file = yaml.safe_load(FILE.read_text("utf-8"))
        file["nodes"]["answer"] |= node or {}
        (tmp_path / "workflows" / FILE.name).write_text(yaml.safe_dump(file))
        workflow = Workflow.load(tmp_path / "workflows" / FILE.name)
        opened.append(workflow)
        return Fallback(workflow, hosted, large)

    yield load_workflow
    for workflow in opened:
        until(lambda workflow=workflow: workflow.engine.in_flight == 0)
        until(lambda: hosted.open == large.open == 0)
        workflow.close()


def whole(chunks: list[TextChunk]) -> tuple[str, str | None]:
    """The text, and who wrote it; of an answer that has one end, and one count of tokens."""
    assert [chunk.finish_reason is not None for chunk in chunks].count(True) == 1
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return "".join(chunk.text for chunk in chunks), chunks[-1].served_by


def own_text(llama: Path, text: str) -> str:
    return greedy_text(llama / "llama", chat_prompt(llama / "llama", text), 16)


def refusing() -> socket.socket:
    """A port at which nobody listens."""
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    return taken


class TestWhoAnswers:
    """Before the first chunk, the next one stands in."""

    def test_without_a_fault_nobody_else_is_asked(self, load: Load) -> None:
        flow = load()

        assert whole(flow.ask()) == (ANSWER, HOSTED)
        assert flow.asked == (1, 0, 0, 0)

    @pytest.mark.parametrize("fault", ["busy for long", "always broken", "needs a key", "moved"])
    def test_what_the_hosted_model_refuses_the_large_one_answers(self, load: Load, fault: str) -> None:
        """429, 500, a key that is not accepted, another address: none of it can the client mend."""
        flow = load()

        assert whole(flow.ask(fault)) == (ANSWER, LARGE)
        assert flow.asked == (1, 1, 0, 0)

    @pytest.mark.parametrize("limit", ["the server's", "the node's"])
    def test_a_silent_model_is_not_waited_for(self, load: Load, limit: str) -> None:
        """The server says nothing for 60 seconds."""
        flow = load(timeout_s=0.5) if limit == "the server's" else load({"first_chunk_s": 0.5})
        began = time.monotonic()

        assert whole(flow.ask("no answer")) == (ANSWER, LARGE)
        assert time.monotonic() - began < SOON_S

    def test_nobody_listens(self, load: Load) -> None:
        with refusing() as taken:
            flow = load(url=f"http://127.0.0.1:{taken.getsockname()[1]}/v1")

            assert whole(flow.ask()) == (ANSWER, LARGE)

    def test_the_name_is_not_known_any_more(self, load: Load) -> None:
        began = time.monotonic()

        assert whole(load({"first_chunk_s": 5}, url="https://hosted.invalid/v1").ask()) == (ANSWER, LARGE)
        assert time.monotonic() - began < SOON_S

    @pytest.mark.parametrize("fault", ["busy for long", "always broken"])
    def test_where_the_large_one_fails_too_the_small_one_answers(self, load: Load, llama: Path, fault: str) -> None:
        flow = load()
        flow.large.fault = fault

        assert whole(flow.ask(fault, temperature=0)) == (own_text(llama, fault), SMALL)
        assert flow.asked == (1, 2, 1, 0)  # the large one has a retry

    def test_where_all_fail_a_sentence_says_so(self, load: Load) -> None:
        flow = load()
        flow.hosted.fault = flow.large.fault = "always broken"

        text, who = whole(flow.ask(TOO_LONG))
        assert (text.startswith("No model can answer"), who) == (True, CANNED)
        assert flow.asked[:2] == (1, 2)

    def test_what_the_client_has_to_mend_it_is_told(self, load: Load) -> None:
        """The others would fail, or answer another question."""
        flow = load()
        with pytest.raises(FailedError, match="maximum context length is 8192") as caught:
            flow.ask("too long")

        assert caught.value.failure.status == 400
        assert flow.asked == (1, 0, 0, 0)

    @pytest.mark.parametrize(
        "budget", [{"tokens_per_minute": 30}, {"money_per_day": 2e-5, "prompt_price": 1, "answer_price": 1}]
    )
    def test_a_budget_that_is_spent_sends_nothing(self, load: Load, budget: dict[str, Any]) -> None:
        """An answer costs 12 tokens, and needs up to 24 before it begins."""
        flow = load(**budget)
        answered = [whole(flow.ask(max_tokens=10)) for _ in range(3)]

        assert answered == [(ANSWER, HOSTED), (ANSWER, LARGE), (ANSWER, LARGE)]
        assert flow.asked == (1, 2, 0, 0)

    def test_the_limits_of_all_fit_into_the_requests(self) -> None:
        """So that the last one has its turn before the client is told 504."""
        file = yaml.safe_load(FILE.read_text("utf-8"))
        node = file["nodes"]["answer"]
        codes = [node, *node["on_error"]["fallback"]]
        longest = sum((code.get("first_chunk_s") or code["timeout_s"]) * (1 + code.get("retry", 0)) for code in codes)

        assert longest < 0.8 * file["serve"]["timeout_s"]


class TestAfterTheFirstChunk:
    @pytest.mark.parametrize(
        ("fault", "status", "said"),
        [
            ("stops in the middle", 502, "stopped in the middle"),
            ("breaks in the middle", 502, "stopped in the middle"),
            ("an error in the middle", 502, "Out of memory"),
            ("silent in the middle", 504, "sent nothing for 0.5 seconds"),
        ],
    )
    def test_the_client_is_told_that_there_is_no_end(self, load: Load, fault: str, status: int, said: str) -> None:
        """It has the beginning of an answer, to which no other model has the end."""
        flow = load(timeout_s=0.5)
        stream = flow.workflow.stream(Chat.of(fault))

        assert [next(stream).text, next(stream).text] == WORDS[:2]
        with pytest.raises(FailedError, match=said) as caught:
            next(stream)
        assert (caught.value.failure.status, flow.asked) == (status, (1, 0, 0, 0))

    def test_the_limit_of_the_first_chunk_cuts_no_answer_off(self, load: Load) -> None:
        flow = load({"first_chunk_s": 4})
        began, chunks = time.monotonic(), []
        for chunk in flow.workflow.stream(Chat.of("without end")):
            chunks.append(chunk.text)
            if time.monotonic() > began + 5:
                break

        assert len(chunks) > len(WORDS)
        assert flow.asked == (1, 0, 0, 0)


class TestCircuit:
    def test_it_opens_and_closes(self, load: Load) -> None:
        """Three failures, then nobody is asked; after a while one is, and its success closes it."""
        flow = load({"circuit": {"failures": 3, "open_s": 1}})
        flow.hosted.fault = "always broken"
        before = time.monotonic()
        assert [flow.who() for _ in range(3)] == [LARGE] * 3
        until(lambda: (flow.who(), len(flow.hosted.bodies)) == (LARGE, 4))
        assert time.monotonic() - before >= 1  # then it was tried again, and has failed
        flow.hosted.fault = ""
        until(lambda: flow.who() == HOSTED)

        assert [flow.who() for _ in range(5)] == [HOSTED] * 5

    @pytest.mark.parametrize("fault", ["busy for long", "no answer"])
    def test_an_open_circuit_costs_nothing(self, load: Load, fault: str) -> None:
        """Time-outs count as well: what was cancelled after one does not pass for a success."""
        flow = load({"first_chunk_s": 1, "circuit": {"failures": 2, "open_s": 300}})
        flow.hosted.fault = fault
        answered = [whole(flow.ask()) for _ in range(6)]

        assert answered == [(ANSWER, LARGE)] * 6
        assert flow.asked == (2, 6, 0, 0)

    def test_a_client_that_leaves_neither_opens_nor_closes_it(self, load: Load) -> None:
        flow = load({"circuit": {"failures": 2, "open_s": 300}})
        flow.hosted.fault = "always broken"
        assert flow.who() == LARGE
        flow.hosted.fault = "without end"
        stream = flow.workflow.stream(Chat.of("Hello"))
        next(stream)
        stream.close()
        until(lambda: flow.hosted.open == 0)
        flow.hosted.fault = "always broken"
        assert flow.who() == LARGE
        asked = len(flow.hosted.bodies)

        assert (flow.who(), len(flow.hosted.bodies)) == (LARGE, asked)

    def test_what_clients_have_to_mend_does_not_open_it(self, load: Load) -> None:
        flow = load({"circuit": {"failures": 2, "open_s": 300}})
        for _ in range(4):
            with pytest.raises(FailedError):
                flow.ask("too long")

        assert flow.who() == HOSTED


def test_requests_that_fall_back_harm_no_others(load: Load) -> None:
    """Sixty at once, of every kind: each has the answer of its own, once, and the silent ones hold nobody up."""
    flow = load({"first_chunk_s": 15, "circuit": {"failures": 1000}})
    kinds = {
        "Hello": (ANSWER, HOSTED),
        "busy for long": (ANSWER, LARGE),
        "always broken": (ANSWER, LARGE),
        "no answer": (ANSWER, LARGE),
        "too long": "This model's maximum context length is 8192 tokens.",
        "stops in the middle": "The model's server stopped in the middle of its answer.",
    }

    def ask(kind: str) -> object:
        try:
            return whole(flow.ask(kind))
        except FailedError as error:
            return error.failure.message

    asked = list(kinds) * 10
    with ThreadPoolExecutor(len(asked)) as threads:
        answered = list(threads.map(ask, asked))

    assert answered == [kinds[kind] for kind in asked]
    assert flow.hosted.times == dict.fromkeys(kinds, 10)
    assert flow.asked == (60, 30, 0, 0)
