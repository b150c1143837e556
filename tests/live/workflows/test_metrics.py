"""A workflow's numbers at a real TorchServe's /metrics, exact to the item."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from tests.live.conftest import Serving
from torchserve_dag.clients import RequestRefused, RestClient
from torchserve_dag.runtime.messages import Text

WORKFLOW = """
name: letters
version: "2.0"
does: Counts the words of a text that have an x.
serve: {workers: 2}
nodes:
  split: {function: split}
  has_x: {function: has_x, each: split}
  add: {function: add, inputs: {found: has_x}}
output: add
"""

FUNCTIONS = """
from torchserve_dag import InputError, Text

def split(item: Text) -> list[str]:
    if item.text == "?":
        raise InputError("There is no word in it.", 422)
    return item.text.split()

def has_x(item: str) -> int: return int("x" in item)

def add(found: list[int]) -> Text: return Text(str(sum(found)))
"""

FILES = {"workflows/letters.yaml": WORKFLOW, "workflows/letters.py": FUNCTIONS}

PREFIX = "torchserve_dag_node_"
Numbers = dict[tuple[str, ...], float]
"""By metric, node, and a bucket's upper bound where it is one."""


def scrape(server: Serving) -> Numbers:
    page = httpx.get(f"{server.addresses.metrics}/metrics").raise_for_status().text
    found: Numbers = {}
    for metric, labelled, value in re.findall(rf"^{PREFIX}(\w+)\{{(.*)\}} (\S+)$", page, re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', labelled))
        if labels["workflow"] != "letters":
            continue
        assert labels["version"] == "2.0"
        found[(metric, *(labels[name] for name in ("node", "le") if name in labels))] = float(value)
    return found


def scrape_until(server: Serving, expected: Numbers) -> Numbers:
    """What is there when it is as expected, and twice the same: a worker publishes once a second, line by line."""
    deadline = time.monotonic() + 60
    before: Numbers = {}
    while True:
        found = scrape(server)
        if (expected.items() <= found.items() and found == before) or time.monotonic() > deadline:
            assert {series: found.get(series) for series in expected} == expected
            return found
        before = found
        time.sleep(0.2)


def items(count: Mapping[str, int]) -> Numbers:
    """What says how many items each node had."""
    metrics = (
        ("items_total",),
        ("queue_seconds_count",),
        ("queue_seconds_bucket", "+Inf"),
        ("batch_size_sum",),
    )
    return {(name, node, *bound): number for name, *bound in metrics for node, number in count.items()}


def batches(found: Numbers, node: str) -> float:
    """How many batches a node had, as all of its series say."""
    (same,) = {
        found["run_seconds_count", node],
        found["run_seconds_bucket", node, "+Inf"],
        found["batch_size_count", node],
        found["batch_size_bucket", node, "+Inf"],
    }
    return same


def ask(rest: RestClient, text: str) -> str:
    try:
        return rest.predict("letters", Text(text), answer=Text).text
    except RequestRefused as refused:
        return f"{refused.status} {refused.node}"


def pids(rest: RestClient) -> set[int]:
    """Of its workers that are ready."""
    workers = [worker for m in rest.models() if m.name == "letters" for v in m.versions for worker in v.workers]
    return {worker.pid for worker in workers if worker.ready}


def replace_workers(rest: RestClient) -> None:
    for pid in (old := pids(rest)):
        psutil.Process(pid).kill()
    deadline = time.monotonic() + 60
    while len(pids(rest) - old) < len(old):
        assert time.monotonic() < deadline, "the workers did not come back within 60 s"
        time.sleep(0.2)


def test_every_item_is_counted_once_whatever_became_of_it_and_of_its_worker(server: Serving) -> None:
    nodes = ("request", "split", "has_x", "add")
    started = scrape_until(server, items(dict.fromkeys(nodes, 0)))
    with server.rest() as rest, ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda text: ask(rest, text), ["an axe, a box, a cup", "?", "x", "?"] * 10))
        counted = {"request": 40, "split": 40, "has_x": 70, "add": 20}
        failed: Numbers = {("failures_total", node): 20 if node == "split" else 0 for node in nodes}
        found = scrape_until(server, items(counted) | failed | {("skipped_total", "add"): 0})

        replace_workers(rest)
        assert scrape(server) == found
        assert ask(rest, "x") == "1"
        again = scrape_until(server, items({node: count + 1 for node, count in counted.items()}) | failed)

    assert answers == ["2", "422 split", "1", "422 split"] * 10
    assert started.keys() == found.keys() == again.keys()
    for node in nodes:
        assert 0 < batches(found, node) <= counted[node]
        assert batches(again, node) == batches(found, node) + 1
        assert 0 < found["run_seconds_sum", node] < again["run_seconds_sum", node]


def test_buckets_count_what_the_smaller_ones_count_too(server: Serving) -> None:
    found = scrape_until(server, {("failures_total", "add"): 0})

    for metric in ("queue_seconds", "run_seconds", "batch_size"):
        bounds = sorted(
            (float(key[2]), value) for key, value in found.items() if key[:2] == (f"{metric}_bucket", "add")
        )
        values = [value for _, value in bounds]
        assert len(values) > 8
        assert values == sorted(values)
        assert values[-1] == found[f"{metric}_count", "add"]
