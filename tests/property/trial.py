"""A trial: a workflow is written, loaded and run; differences from the naive executor become sentences."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.property.functions import BATCHES, OPS, Call, Op, shared
from tests.property.naive import Outcome, naive
from tests.property.workflows import Ask, Flow
from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.options import Options
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.engine.request import Request
from torchserve_dag.runtime.engine.streaming import MAX_UNTAKEN_BYTES, SendChunk
from torchserve_dag.runtime.messages import Failure
from torchserve_dag.runtime.workflow import Workflow

LIMIT_S = 60.0
"""A request that takes longer is taken to hang."""
LEFT_S = 30.0


@dataclass
class Asked:
    """A submitted request, and its expected outcome."""

    ask: Ask
    tag: str
    expected: Outcome
    request: Request
    chunks: list[Any] = field(default_factory=list)
    answer: Any = None


def write(project: Path, flow: Flow) -> str:
    """Write a workflow and those inside it; their YAML for a report."""
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
    shared.clear()  # of the calls that warmed the handlers up
    return workflow


def ask_all(workflow: Workflow, flow: Flow, chosen: Sequence[Ask]) -> list[Asked]:
    """Submit all requests at once, and cancel those that are to be cancelled, each after its time."""
    asked = []
    for i, ask in enumerate(chosen):
        tag = f"r{i}"
        message, parameters = ask.message(flow, tag), ask.parameters(tag)
        expected = naive(flow, message, parameters, ask.outputs)
        expected.unknown |= ask.end == "deadline" and expected.flaky
        chunks: list[Any] = []
        request = workflow.engine.submit(
            json.dumps(plain.flatten(message)).encode() if ask.as_bytes else message,
            parameters,
            options=Options(
                outputs=ask.outputs,
                timeout_s=ask.after_s + 0.001 if ask.end == "deadline" else None,
                priority="bulk" if ask.bulk else "interactive",
            ),
            on_chunk=_receiver(chunks, at_once=i % 2 == 0),
        )
        asked.append(Asked(ask, tag, expected, request, chunks))
    began = time.monotonic()
    for one in sorted(asked, key=lambda one: one.ask.after_s):
        if one.ask.end == "cancel":
            time.sleep(max(0.0, one.ask.after_s - (time.monotonic() - began)))
            one.request.cancel()
    return asked


def _receiver(chunks: list[Any], *, at_once: bool) -> SendChunk:
    """Keeps each chunk. Not `at_once`: the chunk is so large that its node waits until another thread has taken it."""

    def receive(chunk: Any, taken: Callable[[], None]) -> int:
        chunks.append(chunk)
        if at_once:
            taken()
        else:
            threading.Thread(target=taken).start()
        return MAX_UNTAKEN_BYTES

    return receive


def wrong_with(one: Asked) -> list[str]:
    """Differences of a request's answer from the expected outcome."""
    expected, answer, problems = one.expected, one.answer, []
    stopped = isinstance(answer, Failure) and answer.status == {"cancel": 499, "deadline": 408}.get(one.ask.end)
    if not stopped and not expected.unknown and not is_answer(expected, answer):
        problems.append("the answer is wrong")
    if expected.unknown:
        return problems
    if expected.chunks is None:
        if one.chunks:
            problems.append(f"chunks of an answer that does not stream: {one.chunks}")
    elif one.chunks != list(expected.chunks[: len(one.chunks)]):
        problems.append(f"the chunks are {one.chunks}")
    elif not stopped and not isinstance(answer, Failure) and len(one.chunks) != len(expected.chunks):
        problems.append(f"there are only {len(one.chunks)} chunks")
    return problems


def is_answer(expected: Outcome, answer: Any) -> bool:
    if not expected.failures:
        in_chunks = expected.chunks is not None and isinstance(expected.answer, list)
        return bool(answer == ([] if in_chunks else expected.answer))
    return isinstance(answer, Failure) and any(
        answer.status == fail.status
        and fail.message in {None, answer.message}
        and fail.node == "/".join(part.partition(".")[0] for part in str(answer.node).split("/"))
        for fail in expected.failures
    )


def miscounted(asked: Sequence[Asked]) -> list[str]:
    """Calls that were made more or less often than expected."""
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
    """Functions for which `counts()` differs from the number of their calls."""
    made: Counter[str] = Counter()
    for (name, _), times in shared.calls.items():
        made[name] += times
    counts = workflow.counts()
    problems = []
    for code, op in _codes(flow, ""):
        if not op.yields and counts[code].items != made[op.name]:  # each chunk counts as an item
            problems.append(f"{code} ran {made[op.name]} times, and counts() says {counts[code].items}")
    return problems


def _codes(flow: Flow, prefix: str) -> Iterator[tuple[str, Op]]:
    """The functions by the names of their codes."""
    for step in flow.steps.values():
        for run in step.all_runs:
            name = f"{prefix}{step.name}"
            if run in step.fallbacks:
                several = len(step.fallbacks) > 1
                name += f".fallback_{step.fallbacks.index(run) + 1}" if several else ".fallback"
            elif len(step.runs) > 1:
                name += f".{run.called}"
            if run.op:
                yield name, run.op
            if run.flow:
                yield from _codes(run.flow, f"{name}/")


def left_behind(workflow: Workflow) -> list[str]:
    """What is still queued or in flight LEFT_S after the last answer."""
    deadline = time.monotonic() + LEFT_S
    while True:
        left = [
            f"{station.name}: {len(station)} wait" for station in workflow.engine._stations.values() if len(station)
        ]
        left += [f"{s.name}: {s.in_flight} in flight" for s in workflow.engine._stations.values() if s.in_flight]
        left += [f"{workflow.engine.in_flight} requests"] if workflow.engine.in_flight else []
        left += [f"{shared.in_flight} calls"] if shared.in_flight else []
        if not left or time.monotonic() > deadline:
            return [f"left behind: {what}" for what in left]
        time.sleep(0.001)


def threads_left(before: set[threading.Thread]) -> list[str]:
    """Threads that are alive LEFT_S after the close."""
    deadline = time.monotonic() + LEFT_S
    while (left := {one for one in threading.enumerate() if one.name != logs.COUNTER} - before) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.001)
    return [f"a thread is left: {thread.name}" for thread in left]


def report(text: str, asked: Sequence[Asked], problems: Sequence[str]) -> str:
    """What it takes to understand and reproduce the problems."""
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
        if expected.chunks is not None:
            lines += [f"  chunks   {list(expected.chunks)}", f"  got      {one.chunks}"]
    return "\n".join(lines)
