"""One trial: a workflow is written, loaded and asked; what is not as the naive executor says is put into words."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.property.functions import BATCHES, OPS, Call, Op, shared
from tests.property.naive import Outcome, naive
from tests.property.workflows import Ask, Flow
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.workflow import Workflow

LIMIT_S = 60.0
"""A request that takes longer hangs."""
LEFT_S = 30.0


@dataclass
class Asked:
    """A request that was made, and what must become of it."""

    ask: Ask
    tag: str
    expected: Outcome
    request: Request
    pieces: list[Any] = field(default_factory=list)
    answer: Any = None


def write(project: Path, flow: Flow) -> str:
    """Writes a workflow and those inside; gives it as a person would read it."""
    OPS.clear()
    OPS.update(flow.ops)
    texts = []
    for one in flow.flows:
        text = yaml.safe_dump(one.yaml, sort_keys=False)
        (project / "workflows" / f"{one.name}.yaml").write_text(text)
        texts.append(text)
    return "\n---\n".join(texts)


def load(project: Path, text: str) -> Workflow:
    try:
        workflow = Workflow.load(project / "workflows" / "flow.yaml")
    except CheckError as error:
        pytest.fail(report(text, [], [str(error)]), pytrace=False)
    shared.clear()  # of the handlers' warming up
    return workflow


def ask_all(workflow: Workflow, flow: Flow, chosen: Sequence[Ask]) -> list[Asked]:
    """All requests at once; those that are to be cancelled are, after their time."""
    asked = []
    for i, ask in enumerate(chosen):
        tag = f"r{i}"
        message, parameters = ask.message(flow, tag), ask.parameters(tag)
        expected = naive(flow, message, parameters, ask.outputs)
        expected.unknown |= ask.end == "deadline" and expected.tries_again
        pieces: list[Any] = []
        request = workflow.submit(
            json.dumps(plain.flatten(message)).encode() if ask.as_bytes else message,
            parameters,
            options=Options(
                outputs=ask.outputs,
                timeout_s=ask.after_s + 0.001 if ask.end == "deadline" else None,
                priority="bulk" if ask.bulk else "interactive",
            ),
            on_chunk=pieces.append,
        )
        asked.append(Asked(ask, tag, expected, request, pieces))
    began = time.monotonic()
    for one in sorted(asked, key=lambda one: one.ask.after_s):
        if one.ask.end == "cancel":
            time.sleep(max(0.0, one.ask.after_s - (time.monotonic() - began)))
            one.request.cancel()
    return asked


def wrong_with(one: Asked) -> list[str]:
    """What is not as it should be with a request's answer."""
    expected, answer, problems = one.expected, one.answer, []
    stopped = isinstance(answer, Failure) and answer.status == {"cancel": 499, "deadline": 504}.get(one.ask.end)
    if not stopped and not expected.unknown and not is_answer(expected, answer):
        problems.append("the answer is wrong")
    if expected.unknown:
        return problems
    if expected.pieces is None:
        if one.pieces:
            problems.append(f"pieces of an answer that does not stream: {one.pieces}")
    elif one.pieces != list(expected.pieces[: len(one.pieces)]):
        problems.append(f"the pieces are {one.pieces}")
    elif not stopped and not isinstance(answer, Failure) and len(one.pieces) != len(expected.pieces):
        problems.append(f"there are only {len(one.pieces)} pieces")
    return problems


def is_answer(expected: Outcome, answer: Any) -> bool:
    if not expected.failures:
        return bool(answer == expected.answer)
    return isinstance(answer, Failure) and any(
        answer.status == fail.status
        and fail.message in {None, answer.message}
        and fail.node == "/".join(part.partition(".")[0] for part in str(answer.node).split("/"))
        for fail in expected.failures
    )


def miscounted(asked: Sequence[Asked]) -> list[str]:
    """Calls that were made too often, or not often enough."""
    most: Counter[Call] = Counter()
    loose: set[Call] = set()
    unknown = {""} if any(one.expected.unknown for one in asked) else set()
    for one in asked:
        whole = one.ask.end == "wait" and not one.expected.failures
        most += one.expected.calls
        loose |= one.expected.loose if whole else {*one.expected.calls}
        unknown |= {one.tag} if one.expected.unknown else set()
    problems = []
    for call in most.keys() | shared.calls.keys():
        name, answer = call
        made, expected = shared.calls[call], most[call]
        if answer.partition(":")[0] not in unknown and (made > expected or (made < expected and call not in loose)):
            problems.append(f"{name} was called {made} times for {answer}, not {expected}")
    return sorted(problems)


def handled_too_many(flow: Flow) -> list[str]:
    most: Counter[str] = Counter()
    for run in (run for inner in flow.flows for run in inner.runs):
        if run.handler:
            most[run.handler] = max(most[run.handler], run.batch or BATCHES[run.handler])
    return [f"{name} had {n} items at once" for name, n in shared.largest.items() if n > most[name]]


def misreported(workflow: Workflow, flow: Flow) -> list[str]:
    """Functions whose number of tries the engine counts otherwise than they do."""
    made: Counter[str] = Counter()
    for (name, _), times in shared.calls.items():
        made[name] += times
    counts = workflow.counts()
    problems = []
    for code, op in _codes(flow, ""):
        if not op.yields and counts[code].items != made[op.name]:  # each piece counts as an item
            problems.append(f"{code} ran {made[op.name]} times, and counts() says {counts[code].items}")
    return problems


def _codes(flow: Flow, prefix: str) -> Iterator[tuple[str, Op]]:
    """The functions, each with the name that the engine gives it."""
    for step in flow.steps.values():
        for run in step.all_runs:
            name = f"{prefix}{step.name}"
            if run is step.fallback:
                name += ".fallback"
            elif len(step.runs) > 1:
                name += f".{run.called}"
            if run.op:
                yield name, run.op
            if run.flow:
                yield from _codes(run.flow, f"{name}/")


def left_behind(workflow: Workflow) -> list[str]:
    """What is still at work LEFT_S after the last answer."""
    deadline = time.monotonic() + LEFT_S
    while True:
        left = [
            f"{station.name}: {len(station)} wait" for station in workflow.engine._stations.values() if len(station)
        ]
        left += [f"{s.name}: {s.in_flight} in flight" for s in workflow.engine._stations.values() if s.in_flight]
        left += [f"{workflow.engine.inside} requests"] if workflow.engine.inside else []
        left += [f"{shared.under_way} calls"] if shared.under_way else []
        if not left or time.monotonic() > deadline:
            return [f"left behind: {what}" for what in left]
        time.sleep(0.001)


def threads_left(before: set[threading.Thread]) -> list[str]:
    """Threads that still live LEFT_S after the close."""
    deadline = time.monotonic() + LEFT_S
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.001)
    return [f"a thread is left: {thread.name}" for thread in left]


def report(text: str, asked: Sequence[Asked], problems: Sequence[str]) -> str:
    """All that a person needs to see what went wrong."""
    lines = ["", *problems, "", text]
    lines += [str(op) for op in OPS.values()]
    for one in asked:
        expected = one.expected
        lines += [
            "",
            f"{one.tag}: {one.ask}",
            f"  expected {expected.failures or expected.answer}{' or another' * expected.unknown}",
            f"  got      {one.answer}",
        ]
        if expected.pieces is not None:
            lines += [f"  pieces   {list(expected.pieces)}", f"  got      {one.pieces}"]
    return "\n".join(lines)
