"""A stock TorchServe 0.12.0 is asked what it makes of its own workflows, and ours makes the same of them."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import pytest

from tests import torchserve_specs as specs
from tests.live.stock.conftest import READY_S, Stock
from torchserve_dag.runtime.workflow import Workflow

ANSWERED_WITHIN_S = 120


def ask(url: str, **request: Any) -> httpx.Response:
    """TorchServe 0.12.0 loses an answer now and then, and a node of its engine may be late on a busy machine.

    Such a request fails at the node's `timeout-ms`, and is sent again.
    """
    deadline = time.monotonic() + ANSWERED_WITHIN_S
    while (answer := httpx.post(url, timeout=60, **request)).status_code != 200 and time.monotonic() < deadline:
        time.sleep(0.5)
    return answer


@pytest.mark.parametrize("name", specs.OWN)
def test_torchserve_answers_its_own_workflows_as_we_do(stock: Stock, name: str) -> None:
    file = f"own{list(specs.OWN).index(name)}"
    # A worker has torch in it: one of each is enough. For a lost answer TorchServe waits the whole timeout.
    text = specs.OWN[name].replace("max-workers: 4", "max-workers: 1").replace("300000", "3000")
    registered = stock.register(file, text)
    assert registered.status_code == 200, registered.text
    theirs = ask(f"{stock.inference}/wfpredict/{file}", content=b"a body")
    httpx.delete(f"{stock.management}/workflows/{file}", timeout=60)

    with Workflow.load(stock.root / "workflows" / f"{file}.war") as workflow:
        (ours,) = workflow([b"a body"])

    assert theirs.status_code == 200, theirs.text
    assert (json.loads(ours) if isinstance(ours, bytes) else ours) == theirs.json()


@pytest.mark.parametrize("name", specs.REFUSED)
def test_torchserve_refuses_what_we_refuse(stock: Stock, name: str) -> None:
    answer = stock.register("refused", specs.REFUSED[name])

    assert answer.status_code in {400, 500}, answer.text


FORM = {"data": "abc", "other": "x"}
FILES = {"data": ("a.json", b'{"a": [1]}', "application/json"), "image": ("b", b"\xff\x00", "application/octet-stream")}


@pytest.mark.parametrize(
    "request_",
    [
        {"content": b"plain bytes"},
        {"content": b'{"a": [1]}', "headers": {"Content-Type": "application/json", "X-One": "1"}},
        {"content": b'{"a": ', "headers": {"Content-Type": "application/json"}},
        {"content": "gr\u00fc\u00df".encode(), "headers": {"Content-Type": "text/plain; charset=utf-8"}},
        {"data": FORM, "headers": {"X-One": "1"}},
        {"files": FILES, "data": {"k": "v"}},
    ],
    ids=["bytes", "json", "broken json", "text", "form", "files"],
)
def test_a_war_served_by_our_engine_gives_its_nodes_what_torchserve_gives_them(stock: Stock, request_: Any) -> None:
    """The same `.war`, the same request: the parts by their names, decoded alike, and the headers at every node."""
    if httpx.get(f"{stock.management}/workflows/parts", timeout=30).status_code != 200:
        registered = httpx.post(f"{stock.management}/workflows", params={"url": "parts.war"}, timeout=READY_S)
        assert registered.status_code == 200, registered.text
    theirs = ask(f"{stock.inference}/wfpredict/parts", **request_)
    ours = httpx.post(f"{stock.inference}/predictions/parts", timeout=60, **request_)

    assert (theirs.status_code, ours.status_code) == (200, 200), (theirs.text, ours.text)
    assert ours.json() == theirs.json()
