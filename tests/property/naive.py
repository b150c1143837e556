"""A naive executor of workflows: one request, one node, one item at a time, without the engine.

Where a node fails, it goes on with the nodes that do not depend on it: so it finds all failures, any of which the
engine may meet first, and all calls that the engine may have made by then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
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
    """The result of a node that failed, or that needs a node that failed."""

    chunks: tuple[Any, ...] = ()
    """The chunks before the failure, if the node yields."""


@dataclass(frozen=True)
class Fail:
    status: int
    message: str | None
    """None: any message."""
    node: str
    """`NODE`, or `NODE/NODE` in a sub-workflow."""
    call: Call | None = None


@dataclass
class Outcome:
    answer: Any
    failures: list[Fail]
    """If there are any, the answer is one of them."""
    chunks: Sequence[Any] | None
    """The chunks of a streaming answer, up to the first failure."""
    calls: Counter[Call]
    loose: set[Call]
    """Calls of which the engine may have made fewer, because another node failed meanwhile."""
    unknown: bool
    """Whether the engine's answer depends on the order in which calls happen to run."""
    flaky: bool
    """Whether a call fails in its first tries: near its deadline a request has no time for a retry."""


def naive(flow: Flow, message: Any, parameters: Mapping[str, str], outputs: Sequence[str] = ()) -> Outcome:
    """The expected outcome of a request."""
    book = _Book()
    with writing_into(book.journal):
        answer, failures, values = _Request(flow, parameters, book, ()).run(message, outputs)
    chunks: Sequence[Any] | None = None
    if flow.streaming and not outputs:
        result = values[flow.streaming]
        chunks = () if isinstance(result, Skipped) else result.chunks if isinstance(result, Broken) else result
    calls = book.journal.calls
    return Outcome(
        answer, failures, chunks, calls, set(calls) if failures else book.loose, book.unknown, bool(book.flaky_calls)
    )


@dataclass
class _Book:
    journal: Journal = field(default_factory=lambda: Journal(quick=True))
    loose: set[Call] = field(default_factory=set)
    flaky_calls: list[Call] = field(default_factory=list)
    """Every try of a flaky call."""
    owners: dict[Call, tuple[Any, ...]] = field(default_factory=dict)
    """The item of each flaky call: two items with the same call would share its tries."""
    unknown: bool = False


class _Request:
    """A request's way through a workflow, or an item's through a sub-workflow."""

    def __init__(self, flow: Flow, parameters: Mapping[str, str], book: _Book, place: tuple[Any, ...]) -> None:
        self.flow = flow
        self.parameters = parameters
        self.book = book
        self.place = place
        self.failures: list[Fail] = []

    def run(self, message: Any, outputs: Sequence[str] = ()) -> tuple[Any, list[Fail], Mapping[str, Any]]:
        asked: Mapping[str, Expression] = {name: Path(name, (), self.flow.request) for name in outputs}
        asked = asked or self.flow.outputs
        roots = [root for value in asked.values() for root in value.roots]
        wanted, read = self.flow.needed(roots), self.flow.needed(roots, stoppers=False)
        values: dict[str, Any] = {"parameters": self.parameters, "request": message}
        for name, step in self.flow.steps.items():
            if name in read:
                values[name] = self.step(step, values)
            elif name in wanted:
                values[name] = self.unread(step, values)
        if self.failures:
            return None, self.failures, values
        answers = {name: evaluate(value, values) for name, value in asked.items()}
        return answers.get("", answers), [], values

    def unread(self, step: Step, values: Mapping[str, Any]) -> Any:
        """A step that may end others, and whose result nobody waits for: the request may end before it does."""
        before, failures = Counter(self.book.journal.calls), len(self.failures)
        result = self.step(step, values)
        self.book.loose |= set(self.book.journal.calls - before)
        self.book.unknown |= len(self.failures) > failures
        return result

    def step(self, step: Step, values: Mapping[str, Any]) -> Any:
        broken = {root for root in step.roots if isinstance(values[root], Broken)}
        if broken:
            if broken == {step.could_follow}:
                (source,) = broken  # the items are made of the chunks before the failure
                values = {**values, source: list(values[source].chunks)}
            elif not broken <= step.fed:
                return Broken()
        result = self.loops(step, list(step.levels), values, ()) if step.levels else self.item(step, values, ())
        if step.fed and isinstance(result, Skipped):  # it does not wait for what its sources do, so the answer may not
            self.book.loose |= set(self.book.journal.calls)
            self.book.unknown |= bool(self.failures)
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
        """An item's answer; Broken where it has none, with its failures added to `self.failures`."""
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
        answer: Any = None
        for turn in range(step.repeat.most if step.repeat else 1):
            fails, answer = self.attempts(step, run, taken, (*place, turn), step.retry)
            if fails:
                return self.otherwise(step, here, place, fails, answer)
            said = {step.name: answer, "parameters": self.parameters}
            if not step.repeat or isinstance(answer, Skipped) or evaluate(step.repeat.until, said):
                break
            taken = dict.fromkeys(taken, answer)
        return answer

    def attempts(
        self, step: Step, run: Run, taken: dict[str, Any], place: tuple[Any, ...], retry: int
    ) -> tuple[list[Fail], Any]:
        """The failures of the last attempt, or the answer of the first that succeeds."""
        for left in range(retry, -1, -1):
            made = len(self.book.flaky_calls)
            fails, answer = self.call(step, run, taken, place)
            if not fails:
                break
            flaky = set(self.book.flaky_calls[made:])
            if run.flow and left and flaky and (len(fails) > 1 or flaky != {fails[0].call}):
                self.book.unknown = True
            if all(fail.status < 500 for fail in fails) or _begun(answer):
                break
        return fails, answer

    def otherwise(
        self, step: Step, here: Mapping[str, Any], place: tuple[Any, ...], fails: list[Fail], answer: Any
    ) -> Any:
        """The answer of an item that failed, by the node's policy."""
        if step.on_error == "skip":
            return Skipped(step.name)
        if step.on_error == "default":
            return step.default
        for run in () if _begun(answer) else step.fallbacks:
            taken = self.taken(step, run, here)
            if isinstance(taken, Skipped):
                return [taken] if step.yields else taken
            fails, answer = self.attempts(step, run, taken, (*place, run.called), run.retry)
            if not fails:
                single = step.yields and run.op is not None and not run.op.yields
                return [answer] if single else answer
            if _begun(answer):
                break
        self.failures += fails
        return Broken(answer if isinstance(answer, tuple) else ())

    def taken(self, step: Step, run: Run, here: Mapping[str, Any]) -> dict[str, Any] | Skipped:
        taken = {name: evaluate(value, here) for name, value in step.args.items()}
        for name, value in taken.items():
            if isinstance(value, Skipped) and name not in run.feeds and not run.takes[name].skips:
                return value
        return taken

    def call(self, step: Step, run: Run, taken: dict[str, Any], place: tuple[Any, ...]) -> tuple[list[Fail], Any]:
        """A try of an item: its failures, or its answer; on a failure, the chunks before it as a tuple."""
        if run.flow:
            return self.inner(step, run.flow, taken["x"], place)
        op = run.op or HANDLERS[run.called]
        values = taken if run.op else {"item": taken["x"]}
        call = self.flaky_call(op, values, place)
        chunks: list[Any] = []
        try:
            if not op.yields:
                return [], op.call(values)
            for chunk in _over(op, values) if op.feeds else op.chunks(values):
                chunks.append(chunk)  # noqa: PERF402 (the chunks before a failure are needed)
        except _CutOffError:
            return [], Broken(tuple(chunks))
        except InputError as error:
            return [Fail(error.status, error.message, step.name, call)], tuple(chunks)
        except BaseException:  # noqa: BLE001 (whatever code raises fails its item)
            return [Fail(500, None, step.name, call)], tuple(chunks)
        return [], chunks

    def inner(self, step: Step, flow: Flow, message: Any, place: tuple[Any, ...]) -> tuple[list[Fail], Any]:
        before = Counter(self.book.journal.calls)
        inside = _Request(flow, self.parameters, self.book, place)
        answer, fails, _ = inside.run(message)
        if fails:
            self.book.loose |= set(self.book.journal.calls - before)
        return [Fail(fail.status, fail.message, f"{step.name}/{fail.node}", fail.call) for fail in fails], answer

    def flaky_call(self, op: Op, values: Mapping[str, Any], place: tuple[Any, ...]) -> Call | None:
        n, name = op.digit_and_id(values)
        fate = op.fate(n, name)
        if fate is None or fate.how != "flaky":
            return None
        call = (op.name, name)
        self.book.flaky_calls.append(call)
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


class _CutOffError(BaseException):
    """There is no next chunk, and no end, because the node that gives them has failed."""


async def _source(value: Any) -> AsyncIterator[Any]:
    """The chunks of a node, given its result."""
    chunks = value.chunks if isinstance(value, Broken) else () if isinstance(value, Skipped) else value
    for chunk in chunks:
        yield chunk
    if isinstance(value, Broken):
        raise _CutOffError


def _over(op: Op, values: Mapping[str, Any]) -> Iterator[Any]:
    """What a function over chunks yields. Nothing that it awaits is ever waited for."""
    chunks = op.over({name: _source(value) if name in op.feeds else value for name, value in values.items()})
    while True:
        try:
            anext(chunks).__await__().send(None)
        except StopIteration as chunk:
            yield chunk.value
        except StopAsyncIteration:
            return


def _begun(answer: Any) -> bool:
    """Whether a stream has failed after its first chunk."""
    return isinstance(answer, tuple) and bool(answer)


def _is_broken(result: Any) -> bool:
    return isinstance(result, Broken) or (isinstance(result, list) and any(_is_broken(part) for part in result))


def _before_broken(answers: list[Any]) -> tuple[Any, ...]:
    first = next((i for i, answer in enumerate(answers) if _is_broken(answer)), len(answers))
    return tuple(answers[:first])
