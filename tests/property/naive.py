"""What a workflow answers, found the slow way: one request, one node, one item at a time.

It knows nothing of the engine. Where a request fails, it goes on with all that does not depend on what failed: the
engine may have got as far, and no further, and may have met any of the failures first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.property.functions import HANDLERS, Call, Journal, Op, writing_into
from tests.property.workflows import (
    SIGNS,
    Compare,
    Constant,
    Expression,
    Flow,
    Length,
    Path,
    Run,
    Step,
)
from torchserve_dag.runtime.messages import InputError, Skipped


@dataclass(frozen=True)
class Broken:
    """Stands for the result of a node that failed, or that needs one that did."""

    pieces: tuple[Any, ...] = ()
    """Of a node that yields: those before its failure."""


@dataclass(frozen=True)
class Fail:
    status: int
    message: str | None
    """None: whatever the engine says."""
    node: str
    """`NODE`, or `NODE/NODE` in a workflow inside."""
    call: Call | None = None


@dataclass
class Outcome:
    answer: Any
    failures: list[Fail]
    """Where there are any, one of these is the answer."""
    pieces: Sequence[Any] | None
    """Of a streaming answer; up to the first that fails."""
    calls: Counter[Call]
    loose: set[Call]
    """Of these the engine may have made fewer: they were beside something that failed."""
    unknown: bool
    """Whether the engine's answer depends on what happens to come first."""
    tries_again: bool
    """Whether something fails at first: near its deadline a request has no time for the next try."""


def naive(flow: Flow, message: Any, parameters: Mapping[str, str], outputs: Sequence[str] = ()) -> Outcome:
    """What a request must be answered with."""
    book = _Book()
    with writing_into(book.journal):
        answer, failures, values = _Request(flow, parameters, book, ()).run(message, outputs)
    pieces: Sequence[Any] | None = None
    if flow.streaming and not outputs:
        result = values[flow.streaming]
        pieces = () if isinstance(result, Skipped) else result.pieces if isinstance(result, Broken) else result
    calls = book.journal.calls
    return Outcome(
        answer, failures, pieces, calls, set(calls) if failures else book.loose, book.unknown, bool(book.flickered)
    )


@dataclass
class _Book:
    journal: Journal = field(default_factory=lambda: Journal(quick=True))
    loose: set[Call] = field(default_factory=set)
    flickered: list[Call] = field(default_factory=list)
    """Every call that fails a few times, as often as it was made."""
    owners: dict[Call, tuple[Any, ...]] = field(default_factory=dict)
    """Whose such calls are: two items with the same one would share its tries."""
    unknown: bool = False


class _Request:
    """A request on its way through a workflow, or an item's through one that is inside another."""

    def __init__(self, flow: Flow, parameters: Mapping[str, str], book: _Book, place: tuple[Any, ...]) -> None:
        self.flow = flow
        self.parameters = parameters
        self.book = book
        self.place = place
        self.failures: list[Fail] = []

    def run(self, message: Any, outputs: Sequence[str] = ()) -> tuple[Any, list[Fail], Mapping[str, Any]]:
        asked: Mapping[str, Expression] = {name: Path(name, (), self.flow.request) for name in outputs}
        asked = asked or self.flow.outputs
        wanted = self.flow.needed([root for value in asked.values() for root in value.roots])
        values: dict[str, Any] = {"parameters": self.parameters, "request": message}
        for name, step in self.flow.steps.items():
            if name in wanted:
                values[name] = self.step(step, values)
        if self.failures:
            return None, self.failures, values
        answers = {name: evaluate(value, values) for name, value in asked.items()}
        return answers.get("", answers), [], values

    def step(self, step: Step, values: Mapping[str, Any]) -> Any:
        broken = {root for root in step.roots if isinstance(values[root], Broken)}
        if broken:
            if broken != {step.could_follow}:
                return Broken()
            (source,) = broken  # its items are made of the pieces that there are
            values = {**values, source: list(values[source].pieces)}
        result = self.loops(step, list(step.levels), values, ()) if step.levels else self.item(step, values, ())
        if not _is_broken(result) and not broken:
            return result
        if isinstance(result, Broken):
            return result
        return Broken(_before_broken(result))

    def loops(self, step: Step, levels: Sequence[str], here: Mapping[str, Any], at: tuple[int, ...]) -> Any:
        if not levels:
            return self.item(step, here, at)
        elements = evaluate(step.levels[levels[0]], here)
        if isinstance(elements, Skipped):
            return elements
        return [
            element
            if isinstance(element, Skipped)
            else self.loops(step, levels[1:], {**here, levels[0]: element}, (*at, index))
            for index, element in enumerate(elements)
        ]

    def item(self, step: Step, here: Mapping[str, Any], at: tuple[int, ...]) -> Any:
        """An item's answer: a Broken where it has none, and its failures are noted."""
        if step.when is not None and not evaluate(step.when, here):
            return Skipped(step.name)
        for run in step.runs:
            if run.when is None or evaluate(run.when, here):
                return self.tried(step, run, here, (*self.place, step.name, at))
        return Skipped(step.name)

    def tried(self, step: Step, run: Run, here: Mapping[str, Any], place: tuple[Any, ...]) -> Any:
        taken = self.taken(step, run, here)
        if isinstance(taken, Skipped):
            return taken
        fails: list[Fail] = []
        for left in range(step.retry, -1, -1):
            made = len(self.book.flickered)
            fails, answer = self.call(step, run, taken, place)
            if not fails:
                return answer
            flickered = set(self.book.flickered[made:])
            if run.flow and left and flickered and (len(fails) > 1 or flickered != {fails[0].call}):
                self.book.unknown = True
            if all(fail.status < 500 for fail in fails):
                break
        return self.otherwise(step, here, place, fails, answer)

    def otherwise(
        self, step: Step, here: Mapping[str, Any], place: tuple[Any, ...], fails: list[Fail], answer: Any
    ) -> Any:
        """What stands in for an item that failed."""
        if step.on_error == "skip":
            return Skipped(step.name)
        if step.on_error == "default":
            return step.default
        if step.fallback:
            taken = self.taken(step, step.fallback, here)
            if isinstance(taken, Skipped):
                return taken
            fails, answer = self.call(step, step.fallback, taken, (*place, "fallback"))
            if not fails:
                return answer
        self.failures += fails
        return Broken(answer if isinstance(answer, tuple) else ())

    def taken(self, step: Step, run: Run, here: Mapping[str, Any]) -> dict[str, Any] | Skipped:
        taken = {name: evaluate(value, here) for name, value in step.args.items()}
        for name, value in taken.items():
            if isinstance(value, Skipped) and not run.takes[name].skips:
                return value
        return taken

    def call(self, step: Step, run: Run, taken: dict[str, Any], place: tuple[Any, ...]) -> tuple[list[Fail], Any]:
        """One try of one item: its failures, or its answer; the pieces before a failure, as a tuple."""
        if run.flow:
            return self.inner(step, run.flow, taken["x"], place)
        op = run.op or HANDLERS[run.called]
        values = taken if run.op else {"item": taken["x"]}
        call = self.flicker(op, values, place)
        pieces: list[Any] = []
        try:
            if not op.yields:
                return [], op.call(values)
            for piece in op.pieces(values):
                pieces.append(piece)  # noqa: PERF402 (those before a failure count)
        except InputError as error:
            return [Fail(error.status, error.message, step.name, call)], tuple(pieces)
        except BaseException:  # noqa: BLE001 (whatever code raises fails its item)
            return [Fail(500, None, step.name, call)], tuple(pieces)
        return [], pieces

    def inner(self, step: Step, flow: Flow, message: Any, place: tuple[Any, ...]) -> tuple[list[Fail], Any]:
        before = Counter(self.book.journal.calls)
        inside = _Request(flow, self.parameters, self.book, place)
        answer, fails, _ = inside.run(message)
        if fails:
            self.book.loose |= set(self.book.journal.calls - before)
        return [Fail(fail.status, fail.message, f"{step.name}/{fail.node}", fail.call) for fail in fails], answer

    def flicker(self, op: Op, values: Mapping[str, Any], place: tuple[Any, ...]) -> Call | None:
        n, name = op.meets(values)
        fate = op.fate(n, name)
        if fate is None or fate.how != "flaky":
            return None
        call = (op.name, name)
        self.book.flickered.append(call)
        if self.book.owners.setdefault(call, place) != place:
            self.book.unknown = True
        return call


def evaluate(expression: Expression, values: Mapping[str, Any]) -> Any:
    if isinstance(expression, Path):
        return _read(expression, values)
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, Length):
        return len(_read(expression.of, values))
    if isinstance(expression, Compare):
        return SIGNS[expression.sign](evaluate(expression.left, values), evaluate(expression.right, values))
    truths = [evaluate(part, values) for part in expression.parts]
    return {"and": all(truths), "or": any(truths), "not": not truths[0]}[expression.word]


def _read(path: Path, values: Mapping[str, Any]) -> Any:
    value = values[path.root]
    for name in path.fields:
        if isinstance(value, Skipped):
            return value
        value = value.get(name) if isinstance(value, Mapping) else getattr(value, name)
    return value


def _is_broken(result: Any) -> bool:
    return isinstance(result, Broken) or (isinstance(result, list) and any(_is_broken(part) for part in result))


def _before_broken(answers: list[Any]) -> tuple[Any, ...]:
    first = next((i for i, answer in enumerate(answers) if _is_broken(answer)), len(answers))
    return tuple(answers[:first])
