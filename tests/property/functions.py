"""The functions and handlers of random workflows. Their answers and failures are determined by their inputs.

Every number has an `id` that is a hash of the inputs that it was computed from, so an answer proves which calls led to
it; and every call is counted in a journal.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

from torchserve_dag.runtime.data.plain import name_of
from torchserve_dag.runtime.handler import Handler
from torchserve_dag.runtime.messages import InputError, Skipped

DIGITS = 10
LENGTHS = (0, 1, 2, 3, 0, 1, 5, 2, 9, 1)
"""Length of the list that a digit stands for."""
SKIPPED_DIGIT = 8
"""Code that may answer Skipped answers Skipped for this digit."""
SLOW_S = 0.0005
"""Duration of a slow call, for each unit of its digit."""


@dataclass(frozen=True, slots=True)
class Num:
    n: int
    """A digit. Whether a call fails, and how long it takes, depends only on the digit of its answer."""
    id: str
    """`TAG:HASH`, unique among the numbers of a request."""

    @property
    def odd(self) -> bool:
        return self.n % 2 == 1


@dataclass(frozen=True, slots=True)
class Bag:
    n: int
    id: str
    nums: list[Num]


@dataclass(frozen=True)
class Kind:
    """A type, in a form that the generator can compute with."""

    name: Literal["num", "bag", "int", "flag", "list", "mapping"]
    of: Kind | None = None
    skips: bool = False
    """Whether the value may be Skipped instead."""

    def skipping(self, skips: bool = True) -> Kind:  # noqa: FBT001, FBT002
        return replace(self, skips=skips)

    @property
    def sure(self) -> Kind:
        return self.skipping(skips=False)

    @property
    def depth(self) -> int:
        return 1 + self.of.depth if self.of else 0

    @property
    def annotation(self) -> Any:
        plain: dict[str, Any] = {"num": Num, "bag": Bag, "int": int, "flag": bool, "mapping": dict[str, Any]}
        kind = list[self.of.annotation] if self.of else plain[self.name]  # type: ignore[name-defined]
        return kind | Skipped if self.skips else kind


NUM, BAG, INT, FLAG, MAPPING = Kind("num"), Kind("bag"), Kind("int"), Kind("flag"), Kind("mapping")


def listing(kind: Kind) -> Kind:
    return Kind("list", kind)


def make(kind: Kind, n: int, name: str) -> Any:
    """The value of a kind that a digit stands for."""
    if kind.skips and n == SKIPPED_DIGIT:
        return Skipped(name)
    if kind.of:
        return [make(kind.of, (n + i) % DIGITS, f"{name}.{i}") for i in range(LENGTHS[n])]
    if kind.name == "bag":
        return Bag(n, name, make(listing(NUM), n, name))
    values = {"num": Num(n, name), "int": n, "flag": n % 2 == 1, "mapping": {"n": n}}
    return values[kind.name]


@dataclass(frozen=True)
class Fate:
    """How a call fails: with an InputError (4xx), with an exception, or with an exception in its first few tries."""

    how: Literal["refuse", "raise", "exit", "flaky"]
    number: int = 0
    """The status of the InputError, or how many tries fail."""


class FailedError(Exception):
    """Raised by a function that is meant to fail."""


Call = tuple[str, str]
"""The name of the function or handler, and the id of its answer."""


@dataclass
class Journal:
    """Counts the calls of functions and handlers."""

    calls: Counter[Call] = field(default_factory=Counter)
    in_flight: int = 0
    largest: Counter[str] = field(default_factory=Counter)
    """By handler: the largest batch."""
    quick: bool = False
    """Whether slow calls do not sleep."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, call: Call) -> int:
        """Count a call; how often the same call was made before."""
        with self._lock:
            self.calls[call] += 1
            return self.calls[call] - 1

    @contextmanager
    def call_in_flight(self) -> Iterator[None]:
        with self._lock:
            self.in_flight += 1
        try:
            yield
        finally:
            with self._lock:
                self.in_flight -= 1

    def record_batch(self, handler: str, items: int) -> None:
        with self._lock:
            self.largest[handler] = max(self.largest[handler], items)

    def clear(self) -> None:
        with self._lock:
            self.calls.clear()
            self.largest.clear()


shared = Journal()
_mine = threading.local()


def journal() -> Journal:
    """The current thread's own journal, or the shared one."""
    current: Journal = getattr(_mine, "journal", shared)
    return current


@contextmanager
def writing_into(own: Journal) -> Iterator[None]:
    """Inside the block, the current thread counts calls in `own`."""
    _mine.journal = own
    try:
        yield
    finally:
        del _mine.journal


@dataclass(frozen=True)
class Op:
    """A function, or the computation of a handler."""

    name: str
    takes: Mapping[str, Kind]
    gives: Kind
    """The type of the answer; of one chunk if it yields."""
    fates: Mapping[int, Fate] = field(default_factory=dict)
    """By the digit of the answer."""
    slow: bool = False
    yields: bool = False
    feeds: frozenset[str] = frozenset()
    """The parameters whose chunks it takes as they come. It yields, then."""

    def __str__(self) -> str:
        """For a test report."""
        takes = ", ".join(f"{name}: {name_of(kind.annotation)}" for name, kind in self.takes.items())
        gives = name_of(self.gives.annotation)
        fates = ", ".join(f"{n}: {fate.how} {fate.number or ''}".strip() for n, fate in sorted(self.fates.items()))
        return f"{self.name}({takes}) -> {f'Iterator[{gives}]' if self.yields else gives}{' slow' * self.slow} {fates}"

    def digit_and_id(self, values: Mapping[str, Any]) -> tuple[int, str]:
        """The digit and the id of the answer for these inputs."""
        taken = {name: value for name, value in values.items() if name != "tag"}
        tag = values.get("tag") or next((tag for value in taken.values() for tag in _tags(value)), "")
        n = (sum(self.name.encode()) + sum(sum(_digits(value)) for value in taken.values())) % DIGITS
        text = f"{self.name} {sorted(taken.items())!r}"
        return n, f"{tag}:{blake2b(text.encode(), digest_size=5).hexdigest()}"

    def fate(self, n: int, name: str) -> Fate | None:
        fate = self.fates.get(n)
        # Tries are counted by call: a call without its request's tag, which two requests may share, is never flaky.
        return None if fate and fate.how == "flaky" and name.startswith(":") else fate

    def begin(self, n: int, name: str) -> None:
        """Count the call, sleep if it is slow, and fail if that is its fate."""
        book = journal()
        tries = book.enter((self.name, name))
        if self.slow and not book.quick:
            time.sleep(n * SLOW_S)
        fate = self.fate(n, name)
        if fate and not self.yields and (fate.how != "flaky" or tries < fate.number):
            fail(fate, self.name, name)

    def call(self, values: Mapping[str, Any]) -> Any:
        n, name = self.digit_and_id(values)
        with journal().call_in_flight():
            self.begin(n, name)
            return make(self.gives, n, name)

    def chunks(self, values: Mapping[str, Any]) -> Iterator[Any]:
        n, name = self.digit_and_id(values)
        fate = self.fate(n, name)
        with journal().call_in_flight():
            self.begin(n, name)
            made = make(listing(self.gives), n, name)
        for i, chunk in enumerate(made):
            if fate and i >= len(made) // 2:
                fail(fate, self.name, name)
            if self.slow and not journal().quick:
                time.sleep(n * SLOW_S)
            yield chunk

    async def over(self, values: Mapping[str, Any]) -> AsyncIterator[Any]:
        """Makes a chunk of each of the first source and one of each other source, and holds some of them back. Its last
        chunk is made of what the other sources have left.
        """
        first, *others = sorted(self.feeds)
        whole = {name: value for name, value in values.items() if name not in self.feeds}
        async for one in values[first]:
            taken = {first: one} | {name: await anext(values[name], None) for name in others}
            n, name = self._made_of({**whole, **taken})
            if n % 3:
                yield make(self.gives, n, name)
        left: dict[str, Any] = {first: []}
        for other in others:
            left[other] = [chunk async for chunk in values[other]]
        yield make(self.gives, *self._made_of({**whole, **left}))

    def _made_of(self, values: Mapping[str, Any]) -> tuple[int, str]:
        n, name = self.digit_and_id(values)
        with journal().call_in_flight():
            self.begin(n, name)
        if fate := self.fate(n, name):
            fail(fate, self.name, name)
        return n, name

    def function(self) -> Callable[..., Any]:
        """The Python function of a project. `tag` names the request where the other inputs do not."""

        def whole(**values: Any) -> Any:
            return self.call(values)

        def in_chunks(**values: Any) -> Iterator[Any]:
            yield from self.chunks(values)

        async def over_chunks(**values: Any) -> AsyncIterator[Any]:
            async for chunk in self.over(values):
                yield chunk

        made: Callable[..., Any] = over_chunks if self.feeds else in_chunks if self.yields else whole
        kinds = {name: self._annotation(name) for name in self.takes} | {"tag": str | None}
        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None if name == "tag" else inspect.Parameter.empty
            )
            for name in kinds
        ]
        answer = self.gives.annotation
        made.__name__ = self.name
        chunks: Any = AsyncIterator[answer] if self.feeds else Iterator[answer]  # type: ignore[valid-type]
        made.__annotations__ = kinds | {"return": chunks if self.yields else answer}
        made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return made

    def _annotation(self, parameter: str) -> Any:
        kind = self.takes[parameter]
        if parameter not in self.feeds:
            return kind.annotation
        assert kind.of is not None
        return AsyncIterator[kind.of.annotation]  # type: ignore[name-defined]


def fail(fate: Fate, op: str, name: str) -> None:
    if fate.how == "refuse":
        raise InputError(f"{op} refuses {name}.", fate.number)
    if fate.how == "exit":
        raise SystemExit(op)
    raise FailedError(op)


def _digits(value: Any) -> Iterator[int]:
    if isinstance(value, Num):
        yield value.n
    elif isinstance(value, Bag):
        yield value.n
        yield from _digits(value.nums)
    elif isinstance(value, int):
        yield value
    elif isinstance(value, Skipped):
        yield 3
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _digits(part)


def _tags(value: Any) -> Iterator[str]:
    if isinstance(value, Num | Bag):
        tag, _, rest = value.id.partition(":")
        if tag and rest:
            yield tag
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tags(part)


OPS: dict[str, Op] = {}
"""The functions of the workflow under test."""


def function_named(name: str) -> Callable[..., Any]:
    """The `__getattr__` of the project's module, so that each op of the workflow under test is a function of it."""
    if name not in OPS:
        raise AttributeError(name)
    return OPS[name].function()


HANDLERS = {
    op.name: op
    for op in (
        Op("plain", {"item": NUM}, NUM),
        Op("picky", {"item": NUM}, NUM, {4: Fate("refuse", 422), 7: Fate("raise"), 2: Fate("flaky", 1)}, slow=True),
        Op("bagger", {"item": NUM}, BAG, {5: Fate("raise")}),
        Op("counter", {"item": BAG}, NUM),
    )
}
BATCHES = {"plain": 4, "picky": 3, "bagger": 8, "counter": 1}


class Worker(Handler[Any, tuple[int, str], tuple[int, str], Any]):
    """A handler that computes an op: it raises InputError in `preprocess`, and an exception for a batch with a bad item."""

    op: ClassVar[Op]

    def load(self, folder: Any, settings: Any, placement: Any) -> None:
        pass

    def example(self) -> Any:
        (kind,) = self.op.takes.values()
        examples = (make(kind, n, "example") for n in range(DIGITS))
        return next(one for one in examples if self.op.digit_and_id({"item": one})[0] not in self.op.fates)

    def begin(self, item: Any) -> tuple[int, str]:
        n, name = self.op.digit_and_id({"item": item})
        fate = self.op.fates.get(n)
        later = replace(self.op, fates={}) if fate and fate.how == "raise" else self.op
        with journal().call_in_flight():
            later.begin(n, name)
        return n, name

    def infer(self, batch: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        journal().record_batch(self.op.name, len(batch))
        for n, name in batch:
            fate = self.op.fates.get(n)
            if fate and fate.how == "raise":
                fail(fate, self.op.name, name)
        return list(batch)

    def end(self, output: tuple[int, str]) -> Any:
        return make(self.op.gives, *output)


FUNCTIONS_FILE = "from tests.property.functions import function_named as __getattr__\n"


def handler_files(op: Op) -> tuple[str, str]:
    """The Python and YAML files of a handler."""
    (takes,) = op.takes.values()
    names = {"num": "Num", "bag": "Bag"}
    code = f"""
from tests.property.functions import HANDLERS, Bag, Num, Worker

class Own(Worker):
    op = HANDLERS["{op.name}"]

    def preprocess(self, item: {names[takes.name]}) -> tuple[int, str]:
        return self.begin(item)

    def postprocess(self, output: tuple[int, str], item: {names[takes.name]}) -> {names[op.gives.name]}:
        return self.end(output)
"""
    micro_batch = "\n  micro_batch: {size: 2, preprocess: 2}" if op.name == "picky" else ""
    card = "card: {does: A test., input: A number., output: A number., limits: It is small., weights: []}"
    return code, f'name: {op.name}\nversion: "1.0"\n{card}\nrun:\n  batch: {BATCHES[op.name]}{micro_batch}\n'
