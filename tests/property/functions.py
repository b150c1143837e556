"""What the nodes of random workflows run: functions and handlers whose answers, and failures, follow from their input.

Every number knows where it comes from (`id`), so that an answer shows each call that made it; and every call is
written into a journal, under the node's and the item's name.
"""

from __future__ import annotations

import inspect
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, ClassVar, Literal

from torchserve_dag.runtime.data.plain import name_of
from torchserve_dag.runtime.handler import Handler
from torchserve_dag.runtime.messages import InputError, Skipped

DIGITS = 10
LENGTHS = (0, 1, 2, 3, 0, 1, 5, 2, 9, 1)
"""Of the list that a digit stands for."""
SKIPPED_DIGIT = 8
"""The digit for which code that may answer Skipped does."""
SLOW_S = 0.0005
"""For each unit of its digit a slow call takes so long."""


@dataclass(frozen=True, slots=True)
class Num:
    n: int
    """A digit: what happens to it depends on nothing else."""
    id: str
    """`TAG:WHENCE`, unlike that of any other number of its request."""

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
    """A type, in a form that can be reckoned with."""

    name: Literal["num", "bag", "int", "flag", "list", "mapping"]
    of: Kind | None = None
    skips: bool = False
    """Whether it may be Skipped instead."""

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
    """How a call fails: refused with a status of the 4xx, with an exception, or with an exception a few times."""

    how: Literal["refuse", "raise", "exit", "flaky"]
    number: int = 0
    """The status, or how many tries fail."""


class FailedError(Exception):
    """What a function raises that is meant to fail."""


Call = tuple[str, str]
"""The name of what was called, and the id of its answer."""


@dataclass
class Journal:
    """The calls that were made."""

    calls: Counter[Call] = field(default_factory=Counter)
    under_way: int = 0
    largest: Counter[str] = field(default_factory=Counter)
    """By handler: the most items of one `infer`."""
    quick: bool = False
    """Whether slow calls are as fast as others."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, call: Call) -> int:
        """How often it was made before."""
        with self._lock:
            self.calls[call] += 1
            return self.calls[call] - 1

    @contextmanager
    def working(self) -> Iterator[None]:
        with self._lock:
            self.under_way += 1
        try:
            yield
        finally:
            with self._lock:
                self.under_way -= 1

    def saw(self, handler: str, items: int) -> None:
        with self._lock:
            self.largest[handler] = max(self.largest[handler], items)

    def clear(self) -> None:
        with self._lock:
            self.calls.clear()
            self.largest.clear()


shared = Journal()
_mine = threading.local()


def journal() -> Journal:
    """This thread's own, or the one that all others share."""
    found: Journal = getattr(_mine, "journal", shared)
    return found


@contextmanager
def writing_into(one: Journal) -> Iterator[None]:
    """In here this thread has a journal of its own."""
    _mine.journal = one
    try:
        yield
    finally:
        del _mine.journal


@dataclass(frozen=True)
class Op:
    """One thing to run: a function, or what a handler computes."""

    name: str
    takes: Mapping[str, Kind]
    gives: Kind
    """Of one piece where it yields."""
    fates: Mapping[int, Fate] = field(default_factory=dict)
    """By the digit of its answer."""
    slow: bool = False
    yields: bool = False

    def __str__(self) -> str:
        """For a person."""
        takes = ", ".join(f"{name}: {name_of(kind.annotation)}" for name, kind in self.takes.items())
        gives = name_of(self.gives.annotation)
        fates = ", ".join(f"{n}: {fate.how} {fate.number or ''}".strip() for n, fate in sorted(self.fates.items()))
        return f"{self.name}({takes}) -> {f'Iterator[{gives}]' if self.yields else gives}{' slow' * self.slow} {fates}"

    def meets(self, values: Mapping[str, Any]) -> tuple[int, str]:
        """The digit and the id of the answer."""
        taken = {name: value for name, value in values.items() if name != "tag"}
        tag = values.get("tag") or next((tag for value in taken.values() for tag in _tags(value)), "")
        n = (sum(self.name.encode()) + sum(sum(_digits(value)) for value in taken.values())) % DIGITS
        text = f"{self.name} {sorted(taken.items())!r}"
        return n, f"{tag}:{blake2b(text.encode(), digest_size=5).hexdigest()}"

    def fate(self, n: int, name: str) -> Fate | None:
        found = self.fates.get(n)
        # Tries are counted for each request: what cannot be told from another request's call never flickers.
        return None if found and found.how == "flaky" and name.startswith(":") else found

    def begin(self, n: int, name: str) -> None:
        """Note the call, take its time, and fail if that is its fate."""
        book = journal()
        tries = book.enter((self.name, name))
        if self.slow and not book.quick:
            time.sleep(n * SLOW_S)
        fate = self.fate(n, name)
        if fate and not self.yields and (fate.how != "flaky" or tries < fate.number):
            fail(fate, self.name, name)

    def call(self, values: Mapping[str, Any]) -> Any:
        n, name = self.meets(values)
        with journal().working():
            self.begin(n, name)
            return make(self.gives, n, name)

    def pieces(self, values: Mapping[str, Any]) -> Iterator[Any]:
        n, name = self.meets(values)
        fate = self.fate(n, name)
        with journal().working():
            self.begin(n, name)
            made = make(listing(self.gives), n, name)
        for i, piece in enumerate(made):
            if fate and i >= len(made) // 2:
                fail(fate, self.name, name)
            if self.slow and not journal().quick:
                time.sleep(n * SLOW_S)
            yield piece

    def function(self) -> Callable[..., Any]:
        """As a project's function. `tag` says whose call it is where the other values do not."""

        def whole(**values: Any) -> Any:
            return self.call(values)

        def in_pieces(**values: Any) -> Iterator[Any]:
            yield from self.pieces(values)

        made: Callable[..., Any] = in_pieces if self.yields else whole
        kinds = {name: kind.annotation for name, kind in self.takes.items()} | {"tag": str | None}
        parameters = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None if name == "tag" else inspect.Parameter.empty
            )
            for name in kinds
        ]
        answer = self.gives.annotation
        made.__name__ = self.name
        made.__annotations__ = kinds | {"return": Iterator[answer] if self.yields else answer}  # type: ignore[valid-type]
        made.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return made


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
"""The functions of the workflow that is being tested."""


def function_named(name: str) -> Callable[..., Any]:
    """A project's module has this as its `__getattr__`: a function is there as soon as its op is."""
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
    """A handler that does what its op says: refuses in `preprocess`, and raises for a batch with one bad item."""

    op: ClassVar[Op]

    def load(self, folder: Any, settings: Any, placement: Any) -> None:
        pass

    def example(self) -> Any:
        (kind,) = self.op.takes.values()
        examples = (make(kind, n, "example") for n in range(DIGITS))
        return next(one for one in examples if self.op.meets({"item": one})[0] not in self.op.fates)

    def begin(self, item: Any) -> tuple[int, str]:
        n, name = self.op.meets({"item": item})
        fate = self.op.fates.get(n)
        later = replace(self.op, fates={}) if fate and fate.how == "raise" else self.op
        with journal().working():
            later.begin(n, name)
        return n, name

    def infer(self, batch: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        journal().saw(self.op.name, len(batch))
        for n, name in batch:
            fate = self.op.fates.get(n)
            if fate and fate.how == "raise":
                fail(fate, self.op.name, name)
        return list(batch)

    def end(self, output: tuple[int, str]) -> Any:
        return make(self.op.gives, *output)


FUNCTIONS_FILE = "from tests.property.functions import function_named as __getattr__\n"


def handler_files(op: Op) -> tuple[str, str]:
    """A handler's Python and YAML."""
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
    pieces = "\n  micro_batch: {size: 2, preprocess: 2}" if op.name == "picky" else ""
    card = "card: {does: A test., input: A number., output: A number., limits: It is small., weights: []}"
    return code, f'name: {op.name}\nversion: "1.0"\n{card}\nrun:\n  batch: {BATCHES[op.name]}{pieces}\n'
