"""Two workflows that share one served model, in one real TorchServe: over REST and gRPC, and when the model fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live.conftest import Serving, on_torchserve
from torchserve_dag.clients import Client, GrpcClient, RequestRefused, RestClient, ServerFailed
from torchserve_dag.runtime.messages import Failure, Labels, Text
from torchserve_dag.runtime.workflow import Workflow

UPPER = """
from __future__ import annotations
import os
import re
import time
from pathlib import Path
from torchserve_dag import Handler, InputError, Label, Labels, Text

class Upper(Handler[Text, str, str, Labels]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Text: return Text("example")
    def preprocess(self, item: Text) -> str:
        if item.text == "bad": raise InputError("That text is bad.", 422)
        return item.text
    def infer(self, batch):
        for text in batch:
            if text.startswith("wait:"):
                part = Path(text[5:] + ".part")
                part.write_text(str(os.getpid()))
                part.rename(text[5:] + ".begun")
                while not Path(text[5:]).exists(): time.sleep(0.02)
        return [(text.upper(), len(batch)) for text in batch]
    def postprocess(self, output: tuple[str, int], item: Text) -> Labels:
        return Labels([Label(output[0], 1.0), Label(str(os.getpid()), output[1])])
"""

UPPER_FILE = """
name: upper
version: "1.0"
run: {batch: 16}
serve: {delay_ms: 20}
card: {does: Shouts., input: Text., output: "The text in capitals, and who did it.", limits: It is a test., weights: []}
"""

FUNCTIONS = """
from __future__ import annotations
from torchserve_dag import Labels, Text

def split(text: Text) -> list[Text]:
    return [Text(word) for word in text.text.split()]

def join(words: list[Labels]) -> Labels:
    return Labels([label for word in words for label in word.labels])
"""

SHOUT = """
name: shout
version: "1.0"
does: One call of the served model.
nodes:
  call: {served: {model: upper, at: "GRPC"}}
output: call
"""

SENTENCE = """
name: sentence
version: "1.0"
does: One call of the served model for each word.
nodes:
  words: {function: split}
  call: {served: {model: upper/1.0, at: "GRPC"}, each: words, retry: 6}
  answer: {function: join, input: call}
output: answer
"""

GHOST = """
name: ghost
version: "1.0"
does: Calls a model that is not there.
nodes:
  call: {served: {model: nobody, at: "GRPC", takes: Text, gives: Labels}, retry: 10}
output: call
"""

FILES = {
    "handlers/upper.py": UPPER,
    "handlers/upper.yaml": UPPER_FILE,
    **{f"workflows/{name}.yaml": file for name, file in (("shout", SHOUT), ("sentence", SENTENCE), ("ghost", GHOST))},
    **{f"workflows/{name}.py": FUNCTIONS for name in ("shout", "sentence", "ghost")},
}


@pytest.fixture(params=["rest", "grpc"])
def caller(request: pytest.FixtureRequest, server: Serving) -> Iterator[Client]:
    found: RestClient | GrpcClient = server.rest() if request.param == "rest" else server.grpc()
    with found:
        yield found


def said(answer: Labels) -> list[str]:
    return [label.name for label in answer.labels[::2]]


def workers(answer: Labels) -> set[int]:
    return {int(label.name) for label in answer.labels[1::2]}


def batches(answer: Labels) -> list[float]:
    return [label.score for label in answer.labels[1::2]]


def test_two_workflows_share_one_model(server: Serving, caller: Client) -> None:
    one = caller.predict("shout", Text("hello"), answer=Labels)
    other = caller.predict("sentence", Text("a few words"), answer=Labels)
    alone = caller.predict("upper", Text("alone"), answer=Labels)
    with server.rest() as rest:
        served = {model.name: version.workers for model in rest.models() for version in model.versions}

    assert (said(one), said(other)) == (["HELLO"], ["A", "FEW", "WORDS"])
    assert len(served["upper"]) == 1
    assert workers(one) == workers(other) == workers(alone)


def test_the_items_of_one_node_share_the_served_models_batches(caller: Client) -> None:
    """They start together, so TorchServe and the worker behind it find them together."""
    answer = caller.predict("sentence", Text("word " * 64), answer=Labels)

    assert said(answer) == ["WORD"] * 64
    assert max(batches(answer)) > 1


def test_many_requests_of_both_get_their_own_answers(caller: Client) -> None:
    texts = [f"request {number} of many" for number in range(40)]
    with ThreadPoolExecutor(16) as threads:
        ones = threads.map(lambda text: caller.predict("shout", Text(text), answer=Labels), texts)
        others = threads.map(lambda text: caller.predict("sentence", Text(text), answer=Labels), texts)

        assert [said(answer) for answer in ones] == [[text.upper()] for text in texts]
        assert [said(answer) for answer in others] == [text.upper().split() for text in texts]


def test_a_refusal_of_the_served_model_reaches_the_client(caller: Client) -> None:
    with pytest.raises(RequestRefused) as refused:
        caller.predict("sentence", Text("good bad good"))

    assert (refused.value.status, refused.value.node) == (422, "call")
    assert refused.value.message.startswith("That text is bad. (upper of upper/1.0 at 127.0.0.1:")


def test_a_model_that_is_not_there_is_said_at_once(server: Serving, caller: Client) -> None:
    """Ten tries would take 50 seconds."""
    begun = time.monotonic()
    with pytest.raises(ServerFailed) as failed:
        caller.predict("ghost", Text("hello"))

    assert (failed.value.status, failed.value.type, failed.value.node) == (502, "ModelNotFound", "call")
    said = "Model not found: nobody" if server.host == "torchserve" else "There is no model of that name"
    assert said in failed.value.message
    assert time.monotonic() - begun < 30


def kill_worker(begun: Path) -> int:
    """Kill the served model's worker as soon as it has left its pid in `begun`; which one it was."""
    deadline = time.monotonic() + 60
    while not begun.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    worker = int(begun.read_text())
    os.kill(worker, signal.SIGKILL)
    return worker


@on_torchserve  # its queue waits for the next worker
def test_a_worker_that_is_killed_costs_a_node_with_retries_only_time(caller: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(caller.predict, "sentence", Text(f"before wait:{gate} after"), answer=Labels)
        killed = kill_worker(Path(f"{gate}.begun"))
        gate.touch()
        answer = pending.result()

    assert said(answer) == ["BEFORE", f"WAIT:{gate}".upper(), "AFTER"]
    assert killed not in workers(answer)


@on_torchserve
def test_a_worker_that_is_killed_fails_a_node_without_retries(caller: Client, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with ThreadPoolExecutor(1) as threads:
        pending = threads.submit(caller.predict, "shout", Text(f"wait:{gate}"))
        kill_worker(Path(f"{gate}.begun"))
        with pytest.raises(ServerFailed) as failed:
            pending.result()
    gate.touch()

    assert (failed.value.status, failed.value.type, failed.value.node) == (502, "ServedModelFailed", "call")
    assert "Worker died" in failed.value.message
    assert said(caller.predict("shout", Text("again"), answer=Labels, timeout=60)) == ["AGAIN"]


def test_the_same_workflow_runs_without_a_server_of_its_own(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program in the project's folder finds the token of the server that was started there."""
    monkeypatch.chdir(server.root)
    with Workflow.load("workflows/sentence.yaml") as workflow:
        good, bad = workflow([Text("from here"), Text("bad")])

    assert said(good) == ["FROM", "HERE"]
    assert isinstance(bad, Failure)
    assert (bad.status, bad.node) == (422, "call")
