"""The engine's own cost: workflows of functions that do nothing, in this process, without a server.

    python loadtests/engine_cost.py             a table: microseconds per request and per item
    python loadtests/engine_cost.py --profile   and the time by function

A chain of 1, 3 and 10 nodes and a fan-out over 100 items, one request at a time and 100 together. Each figure is the
median of five runs.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import platform
import pstats
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torchserve_dag.runtime.engine.lanes import Lanes
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.workflow import Workflow

FUNCTIONS = '''"""Functions that do nothing."""

from torchserve_dag.runtime.messages import Text


def same(text: Text) -> Text:
    return text


def hundred(text: Text) -> list[Text]:
    return [text] * 100
'''
RUNS, TOGETHER = 5, 100


def chain(nodes: int) -> str:
    return "\n".join(f"  n{i}: {{function: same, input: {f'n{i - 1}' if i else 'request'}}}" for i in range(nodes))


FAN_OUT = "  many: {function: hundred}\n  each: {function: same, each: many}"
SHAPES = {
    # name: nodes, output, total items of a request
    "chain of 1": (chain(1), "n0", 1),
    "chain of 3": (chain(3), "n2", 3),
    "chain of 10": (chain(10), "n9", 10),
    "fan-out of 100": (FAN_OUT, "each", 101),
}


def write(folder: Path, nodes: str, output: str) -> Path:
    path = folder / "workflows" / "cost.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'name: cost\nversion: "1.0"\ndoes: Nothing.\nnodes:\n{nodes}\noutput: {output}\n')
    path.with_suffix(".py").write_text(FUNCTIONS)
    return path


def one_at_a_time(workflow: Workflow, requests: int) -> None:
    for _ in range(requests):
        workflow.submit(Text("x")).future.result()


def together(workflow: Workflow, requests: int) -> None:
    for _ in range(requests // TOGETHER):
        for request in [workflow.submit(Text("x")) for _ in range(TOGETHER)]:
            request.future.result()


def microseconds(path: Path, load: Callable[[Workflow, int], None], requests: int) -> float:
    """Microseconds of a request, the median of the runs."""
    with Workflow.load(path) as workflow:
        load(workflow, requests // 5)  # to warm up
        times = []
        for _ in range(RUNS):
            began = time.perf_counter()
            load(workflow, requests)
            times.append((time.perf_counter() - began) / requests * 1e6)
    return statistics.median(times)


def profile(path: Path) -> None:
    """Print the time that the lanes spend in each function."""
    profiles: list[cProfile.Profile] = []
    plain = Lanes._lane  # noqa: SLF001 (threads cannot be profiled from outside)

    def profiled(lanes: Lanes) -> None:
        profiles.append(cProfile.Profile())
        profiles[-1].runcall(plain, lanes)

    Lanes._lane = profiled  # type: ignore[method-assign]  # noqa: SLF001
    with Workflow.load(path) as workflow:
        together(workflow, 500)
    Lanes._lane = plain  # type: ignore[method-assign]  # noqa: SLF001
    stats = pstats.Stats(profiles[0])
    for other in profiles[1:]:
        stats.add(other)
    stats.strip_dirs().sort_stats("tottime").print_stats(15)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", action="store_true", help="also print the time of a fan-out by function")
    options = parser.parse_args()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    say(f"{machine}, Python {platform.python_version()}, torch {torch.__version__}")
    say("microseconds       one at a time         100 together")
    say("                   request     item     request     item")
    with tempfile.TemporaryDirectory() as folder:
        for name, (nodes, output, items) in SHAPES.items():
            path = write(Path(folder), nodes, output)
            row = ""
            for load in (one_at_a_time, together):
                whole = microseconds(path, load, 200 if items > TOGETHER else 2000)
                row += f"{whole:12.0f} {whole / items:8.1f}"
            say(f"{name:15s}{row}")
        if options.profile:
            profile(write(Path(folder), FAN_OUT, "each"))


if __name__ == "__main__":
    main()
