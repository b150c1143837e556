"""A model that hangs: its request is told so, its neighbours are answered, and its worker is replaced."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.live.conftest import Serving
from torchserve_dag.clients import DeadlineExceeded, ServingError
from torchserve_dag.runtime.messages import Text

CODE = """
from __future__ import annotations
import time
from torchserve_dag import Handler, Text

class Sleeper(Handler[Text, str, str, Text]):
    def load(self, folder, settings, placement): pass
    def example(self) -> Text: return Text("example")
    def preprocess(self, item: Text) -> str: return item.text
    def infer(self, batch):
        if "hang" in batch: time.sleep(3600)
        return batch
    def postprocess(self, output: str, item: Text) -> Text: return Text(output.upper())
"""

FILE = """
name: sleeper
version: "1.0"
run: {batch: 4, micro_batch: {size: 1}}
serve: {timeout_s: 3}
card: {does: Sleeps where it is told to., input: Text., output: Text., limits: It is a test., weights: []}
"""


FILES = {"handlers/sleeper.py": CODE, "handlers/sleeper.yaml": FILE}


def _was_replaced(server: Serving) -> bool:
    if server.host == "torchserve":
        return "hangs: this worker ends" in server.log("sleeper")
    return "a model in it hangs" in (server.state.logs / "keeper.log").read_text()


def test_a_hang_in_a_micro_batch_costs_its_own_request_and_the_worker_comes_back(server: Serving) -> None:
    with server.rest() as rest, ThreadPoolExecutor(4) as threads:
        before = rest.predict("sleeper", Text("a"), answer=Text)
        hung = threads.submit(rest.predict, "sleeper", Text("hang"), timeout=20)
        with pytest.raises(DeadlineExceeded) as late:
            hung.result()
        deadline = time.monotonic() + 120
        while True:  # while the worker is replaced there may be none
            try:
                after = rest.predict("sleeper", Text("b"), answer=Text, timeout=30)
                worker_ended = _was_replaced(server)
                if worker_ended:
                    break
            except ServingError:
                pass
            assert time.monotonic() < deadline, "the worker did not come back within 120 s"
            time.sleep(0.5)

    assert (before, after) == (Text("A"), Text("B"))
    assert late.value.status == 504
