"""Random workflows, all of them valid, and random requests for them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from hypothesis import strategies as st

from tests.property.functions import (
    BAG,
    FLAG,
    HANDLERS,
    INT,
    MAPPING,
    NUM,
    Fate,
    Kind,
    Op,
    listing,
    make,
)
from torchserve_dag.runtime.data import plain

T = TypeVar("T")
MOST_STEPS = 7
DEEPEST = 3
"""The deepest nesting of lists, and of workflows."""
SELDOM, OFTEN = 12, 60
"""Percentage of functions that fail for some of their values."""

# Expressions.

SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


@dataclass(frozen=True)
class Path:
    root: str
    fields: tuple[str, ...]
    kind: Kind

    @property
    def text(self) -> str:
        return ".".join((self.root, *self.fields))

    @property
    def roots(self) -> frozenset[str]:
        return frozenset({self.root})


@dataclass(frozen=True)
class Constant:
    value: int | str
    kind: Kind = INT
    roots: frozenset[str] = frozenset()

    @property
    def text(self) -> str:
        return f'"{self.value}"' if isinstance(self.value, str) else str(self.value)


@dataclass(frozen=True)
class Length:
    of: Path
    kind: Kind = INT

    @property
    def text(self) -> str:
        return f"len({self.of.text})"

    @property
    def roots(self) -> frozenset[str]:
        return self.of.roots


@dataclass(frozen=True)
class Compare:
    left: Path | Length
    sign: str
    right: Path | Constant
    kind: Kind = FLAG

    @property
    def text(self) -> str:
        return f"{self.left.text} {self.sign} {self.right.text}"

    @property
    def roots(self) -> frozenset[str]:
        return self.left.roots | self.right.roots


@dataclass(frozen=True)
class Logic:
    word: Literal["and", "or", "not"]
    parts: tuple[Expression, ...]
    kind: Kind = FLAG

    @property
    def text(self) -> str:
        if self.word == "not":
            return f"not ({self.parts[0].text})"
        return f" {self.word} ".join(f"({part.text})" for part in self.parts)

    @property
    def roots(self) -> frozenset[str]:
        return frozenset().union(*(part.roots for part in self.parts))


Expression = Path | Constant | Length | Compare | Logic

TAG = Path("parameters", ("tag",), Kind("int"))  # of no kind that anything else takes
MODE = Path("parameters", ("mode",), Kind("int"))


def paths(scope: Mapping[str, Kind]) -> list[Path]:
    """All paths that begin with a name of the scope."""
    fields = {"num": {"n": INT, "odd": FLAG}, "bag": {"n": INT, "nums": listing(NUM)}}
    found = []
    for root, kind in scope.items():
        found.append(Path(root, (), kind))
        for name, inner in fields.get(kind.name, {}).items():
            found.append(Path(root, (name,), inner.skipping(kind.skips)))
    return found


# Workflows.

Otherwise = Literal["fail", "skip", "default", "fallback"]
"""The `on_error` of a node."""


@dataclass(frozen=True)
class Run:
    """What a step may run: exactly one of op, handler and flow."""

    op: Op | None = None
    handler: str | None = None
    flow: Flow | None = None
    batch: int | None = None
    when: Expression | None = None
    retry: int = 0
    """Of a fallback."""

    @property
    def feeds(self) -> frozenset[str]:
        return self.op.feeds if self.op else frozenset()

    @property
    def called(self) -> str:
        return self.op.name if self.op else self.handler or (self.flow.name if self.flow else "")

    @property
    def takes(self) -> Mapping[str, Kind]:
        """The types of its inputs; a single input without a name is called `x`."""
        if self.flow:
            return {"x": self.flow.request}
        return self.op.takes if self.op else {"x": HANDLERS[self.called].takes["item"]}

    @property
    def gives(self) -> Kind:
        if self.flow:
            return self.flow.answer
        return self.op.gives if self.op else HANDLERS[self.called].gives


@dataclass(frozen=True)
class Rounds:
    until: Expression
    most: int


@dataclass(frozen=True)
class Step:
    """A node."""

    name: str
    runs: tuple[Run, ...]
    """Several of them for a switch."""
    args: Mapping[str, Expression]
    """By parameter."""
    form: Literal["default", "input", "inputs"]
    """The key of the YAML that gives the inputs; none for `default`."""
    levels: Mapping[str, Path]
    when: Expression | None = None
    timeout_s: float | None = None
    retry: int = 0
    on_error: Otherwise = "fail"
    default: Any = None
    fallbacks: tuple[Run, ...] = ()
    repeat: Rounds | None = None
    stops: Mapping[str, Expression] = field(default_factory=dict)
    """Other steps, with conditions on an answer."""
    stopped: bool = False
    """Whether another step, which is not made of its answers, may end it."""
    circuit: bool = False
    """Whether it has a circuit, which never opens."""

    @property
    def yields(self) -> bool:
        return any(run.op is not None and run.op.yields for run in self.runs)

    @property
    def all_runs(self) -> tuple[Run, ...]:
        return (*self.runs, *self.fallbacks)

    @property
    def fed(self) -> frozenset[str]:
        """The nodes that it takes nothing of but their chunks, as they come."""
        fed, whole = set(), set(self.when.roots if self.when else ())
        for run in self.all_runs:
            for name, arg in self.args.items():
                (fed if name in run.feeds else whole).update(arg.roots)
        return frozenset(fed - whole)

    @property
    def roots(self) -> frozenset[str]:
        """The names of what it waits for."""
        return (self._roots_inside | frozenset().union(*(path.roots for path in self.levels.values()))) - {*self.levels}

    @property
    def _roots_inside(self) -> frozenset[str]:
        whens = [when for when in (self.when, *(run.when for run in self.runs)) if when]
        return frozenset().union(*(one.roots for one in (*self.args.values(), *whens)))

    @property
    def could_follow(self) -> str | None:
        """The node whose chunks it takes as they come, if that node yields."""
        if len(self.levels) != 1:
            return None
        (path,) = self.levels.values()
        return path.root if not path.fields and path.root not in self._roots_inside else None

    @property
    def result(self) -> Kind:
        gives = self.runs[0].gives.skipping(any(run.gives.skips for run in self.all_runs))
        skips = self.when is not None or self.runs[-1].when is not None
        skips = skips or any(
            arg.kind.skips and not run.takes[name].skips
            for run in self.all_runs
            for name, arg in self.args.items()
            if name != "tag" and name not in run.feeds
        )
        if self.yields:
            return listing(gives).skipping(skips)
        gives = gives.skipping(gives.skips or skips or self.on_error == "skip" or self.stopped)
        for path in reversed([*self.levels.values()]):
            assert path.kind.of is not None
            gives = listing(gives.skipping(gives.skips or path.kind.of.skips)).skipping(path.kind.skips)
        return gives

    @property
    def yaml(self) -> dict[str, Any]:
        several = len(self.runs) > 1
        only = {name: path.text for name, path in self.levels.items()}
        data = {"switch": [_run_yaml(run) for run in self.runs]} if several else _run_yaml(self.runs[0])
        said = {
            "each": only["item"] if set(only) == {"item"} else only,
            "input": next(iter(self.args.values())).text if self.form == "input" else None,
            "inputs": {name: arg.text for name, arg in self.args.items()} if self.form == "inputs" else None,
            "when": self.when.text if self.when else None,
            "timeout_s": self.timeout_s,
            "retry": self.retry,
            "on_error": self._otherwise_yaml,
            "repeat": {"until": self.repeat.until.text, "most": self.repeat.most} if self.repeat else None,
            "stops": {name: condition.text for name, condition in self.stops.items()},
            "circuit": {"failures": 1_000_000} if self.circuit else None,
        }
        return data | {key: value for key, value in said.items() if value}

    @property
    def _otherwise_yaml(self) -> Any:
        if self.on_error == "default":
            return {"default": plain.flatten(self.default)}
        if self.fallbacks:
            several = [_run_yaml(run) for run in self.fallbacks]
            return {"fallback": several if len(several) > 1 else several[0]}
        return "skip" if self.on_error == "skip" else None


def _run_yaml(run: Run) -> dict[str, Any]:
    data: dict[str, Any] = {"function" if run.op else "handler" if run.handler else "workflow": run.called}
    if run.batch:
        data["batch"] = run.batch
    if run.when:
        data["when"] = run.when.text
    if run.retry:
        data["retry"] = run.retry
    return data


@dataclass(frozen=True)
class Flow:
    name: str
    request: Kind
    steps: Mapping[str, Step]
    """In topological order."""
    outputs: Mapping[str, Expression]
    """`{"": expression}` for one value without a name."""

    @property
    def answer(self) -> Kind:
        return self.outputs[""].kind if "" in self.outputs else MAPPING

    @property
    def yaml(self) -> dict[str, Any]:
        texts = {name: value.text for name, value in self.outputs.items()}
        return {
            "name": self.name,
            "version": "1.0",
            "does": "A test.",
            "code": "functions.py",
            "nodes": {name: step.yaml for name, step in self.steps.items()},
            "output": texts.get("", texts),
        }

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: FBT001
        """Hypothesis prints only the name: the failed test prints the YAML."""
        printer.text(f"Flow({self.name})")

    @property
    def flows(self) -> Iterator[Flow]:
        """This workflow, and those inside it."""
        yield self
        for run in self.runs:
            if run.flow:
                yield from run.flow.flows

    @property
    def runs(self) -> list[Run]:
        return [run for step in self.steps.values() for run in step.all_runs]

    @property
    def ops(self) -> dict[str, Op]:
        return {run.op.name: run.op for flow in self.flows for run in flow.runs if run.op}

    def streams(self, name: str) -> bool:
        """Whether a node's result comes in chunks."""
        if name not in self.steps:
            return False
        step = self.steps[name]
        return step.yields or (step.could_follow is not None and self.streams(step.could_follow))

    @property
    def streaming(self) -> str | None:
        """The node whose chunks the answer consists of."""
        output = self.outputs.get("")
        return output.root if isinstance(output, Path) and not output.fields and self.streams(output.root) else None

    def needed(self, names: Sequence[str], *, stoppers: bool = True) -> set[str]:
        """The named steps and those that they need; with `stoppers`, also those that may end one of these."""
        found: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            if name in self.steps and name not in found:
                found.add(name)
                todo += self.steps[name].roots
                todo += [other for other, step in self.steps.items() if stoppers and name in step.stops]
        return found


# Requests.

End = Literal["wait", "cancel", "deadline"]
ENDS: tuple[End, ...] = ("wait", "wait", "wait", "wait", "wait", "wait", "cancel", "deadline")


@dataclass(frozen=True)
class Ask:
    """A request without its tag."""

    n: int
    mode: str | None
    as_bytes: bool
    outputs: tuple[str, ...]
    bulk: bool
    end: End
    after_s: float

    def message(self, flow: Flow, tag: str) -> Any:
        return make(flow.request, self.n, f"{tag}:request")

    def parameters(self, tag: str) -> dict[str, str]:
        return {"tag": tag} | ({"mode": self.mode} if self.mode else {})


# How they are made.


@st.composite
def flows(draw: Any, most: int = MOST_STEPS) -> Flow:
    return _Maker(draw).flow("flow", "n", DEEPEST - 1, most)


@st.composite
def asks(draw: Any, flow: Flow, *, patient: bool = False) -> Ask:
    maker = _Maker(draw)
    names = tuple(sorted({maker.one(list(flow.steps)) for _ in range(maker.upto(3))})) if maker.often(20) else ()
    return Ask(
        n=maker.upto(9),
        mode=maker.one([None, "a", "b"]),
        as_bytes=maker.often(30),
        outputs=names,
        bulk=maker.often(30),
        end="wait" if patient else maker.one(ENDS),
        after_s=maker.upto(8) / 1000,
    )


class _Maker:
    """Draws the parts of a workflow; the simplest choice, to which hypothesis shrinks, comes first."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def upto(self, most: int) -> int:
        number: int = self.draw(st.integers(0, most))
        return number

    def often(self, percent: int) -> bool:
        return self.upto(99) >= 100 - percent

    def one(self, options: Sequence[T]) -> T:
        return options[self.upto(len(options) - 1)] if len(options) > 1 else options[0]

    def flow(
        self, name: str, prefix: str, deeper: int, most: int, request: Kind | None = None, fails: int = SELDOM
    ) -> Flow:
        request = request or self.one([NUM, BAG, listing(NUM)])
        scope = {"request": request}
        steps: dict[str, Step] = {}
        for i in range(self.one([1, *range(1, most + 1), most])):
            step = self.step(f"{prefix}{i + 1}", scope, steps, deeper, fails)
            steps[step.name] = step
            self.stop(step.name, steps)
            scope[step.name] = steps[step.name].result
        every = Flow(name, request, steps, self.outputs(steps, scope))
        used = every.needed([root for value in every.outputs.values() for root in value.roots])
        kept = {
            name: replace(step, stops={target: when for target, when in step.stops.items() if target in used})
            for name, step in steps.items()
            if name in used
        }
        return Flow(name, request, kept, every.outputs)

    def outputs(self, steps: Mapping[str, Step], scope: Mapping[str, Kind]) -> dict[str, Expression]:
        last, first = list(steps)[-1], next(iter(steps))
        known = paths(scope)
        outputs: dict[str, Expression] = {"": Path(last, (), scope[last])}
        flow = Flow("", scope["request"], steps, outputs)
        streaming = [name for name in steps if flow.streams(name)]
        if streaming and self.often(30):
            outputs = {"": Path(streaming[-1], (), scope[streaming[-1]])}
        elif self.often(80):
            unread = [name for name in steps if not any(name in step.roots for step in steps.values())]
            outputs = {f"of_{name}": self.value([path for path in known if path.root == name]) for name in unread[-3:]}
            outputs = {"": self.one(known)} if self.often(20) else outputs
        used = flow.needed([root for value in outputs.values() for root in value.roots])
        as_it_is = (arg for name in used for arg in steps[name].args.values())
        if not any(arg.text == "request" for arg in as_it_is):
            outputs = {name or "answer": value for name, value in outputs.items()}
            outputs["first"] = Path(first, (), scope[first])
        return outputs

    def value(self, known: Sequence[Path]) -> Expression:
        path = self.one(known)
        if path.kind == INT and self.often(40):
            return Compare(path, self.one(list(SIGNS)), Constant(self.upto(9)))
        if path.kind.name == "list" and not path.kind.skips and self.often(30):
            return Length(path)
        return path

    # A node.

    def step(self, name: str, scope: Mapping[str, Kind], before: Mapping[str, Step], deeper: int, fails: int) -> Step:
        levels = self.levels(scope, Flow("", NUM, before, {})) if before else {}
        here = dict(scope)
        for level, path in levels.items():
            assert path.kind.of is not None
            here[level] = path.kind.of.sure  # a skipped element is its own answer
        streams = [root for root in before if Flow("", NUM, before, {}).streams(root)]
        fed = bool(streams) and not levels and self.often(40)
        yields = fed or (not levels and self.often(18))
        args, form = self.fed(here, streams) if fed else self.args(here, levels, first=not before)
        retry = self.one([0, 0, 0, 1, 2])
        on_error = self.one(["fail", "fail", "fail", *([] if yields else ["skip", "default"]), "fallback"])
        fails = OFTEN if retry or on_error != "fail" else fails
        deep = sum(1 for _ in levels)
        repeat = None
        if fed:
            feeds = frozenset(one for one in args if one in {"x", "y"} and args[one].text in streams)
            op = self.function(f"do_{name}", args, self.kind(0), fails, yields=True)
            main = Run(replace(op, feeds=feeds, takes=self.taken_as_they_come(op, args, feeds)))
        else:
            main = self.run(name, args, form, deeper, fails, most_deep=DEEPEST - deep, yields=yields)
            main, repeat = self.rounds(name, main, args, fails, yields=yields)
        runs: tuple[Run, ...] = (main,)
        if not yields and not repeat and self.often(20):
            runs = self.switch(name, main, args, here, fails)
        fallbacks: tuple[Run, ...] = ()
        if on_error == "fallback":
            fallbacks = tuple(self.fallback(f"{name}_instead{i}", args, main) for i in range(1 + self.upto(2)))
        when = self.condition(here) if self.often(25) else None
        return Step(
            name,
            runs,
            args,
            form,
            levels,
            when,
            timeout_s=self.one([None] * 5 + [20.0]),
            retry=retry,
            on_error=on_error,  # type: ignore[arg-type]
            default=make(main.gives.sure, self.upto(9), "default") if on_error == "default" else None,
            fallbacks=fallbacks,
            repeat=repeat,
            circuit=self.often(10),
        )

    def fed(
        self, here: Mapping[str, Kind], streams: Sequence[str]
    ) -> tuple[dict[str, Expression], Literal["default", "input", "inputs"]]:
        """The inputs of a function over the chunks of one step or two, and perhaps a whole value."""
        args: dict[str, Expression] = {"x": self.stream(here, streams)}
        if self.often(40):
            args["y"] = self.stream(here, streams)
        if self.often(40):
            args["z"] = self.one(paths(here))
        return args | ({"tag": TAG} if self.often(90) else {}), "inputs"

    def stream(self, here: Mapping[str, Kind], streams: Sequence[str]) -> Path:
        root = streams[len(streams) - 1 - self.upto(len(streams) - 1)]
        return Path(root, (), here[root])

    def taken_as_they_come(self, op: Op, args: Mapping[str, Expression], feeds: frozenset[str]) -> dict[str, Kind]:
        return {name: args[name].kind.sure if name in feeds else kind for name, kind in op.takes.items()}

    def fallback(self, name: str, args: Mapping[str, Expression], main: Run) -> Run:
        yields = main.op is not None and main.op.yields and self.often(50)
        op = self.function(name, args, main.gives, OFTEN if self.often(50) else SELDOM, yields=yields)
        if yields and main.feeds:
            op = replace(op, feeds=main.feeds, takes=self.taken_as_they_come(op, args, main.feeds))
        return Run(op, retry=self.one([0, 0, 1, 2]))

    def rounds(
        self, name: str, main: Run, args: Mapping[str, Expression], fails: int, *, yields: bool
    ) -> tuple[Run, Rounds | None]:
        """Rounds for what a step runs, where that can be: an op is made to give what it takes."""
        kind = args["x"].kind
        if yields or len(args) > 1 or kind.sure not in {NUM, BAG} or not self.often(30):
            return main, None
        if main.op:
            main = Run(self.function(f"do_{name}", args, kind.sure.skipping(self.often(20)), fails))
        if main.gives.sure != kind.sure or main.takes["x"].sure != kind.sure:
            return main, None
        return main, Rounds(self.condition({name: kind.sure}), 2 + self.upto(3))

    def stop(self, name: str, steps: dict[str, Step]) -> None:
        """Let a step end one of which it takes the chunks, or be ended by one before it: under a condition that is
        never true, so that nothing else changes.
        """
        step = steps[name]
        flow = Flow("", NUM, steps, {})
        sources = {*step.fed, *([step.could_follow] if step.could_follow else [])}
        ended = ended_before(step, flow)
        targets = [source for source in sources if flow.streams(source) and source not in ended]
        if targets and self.often(20):
            never = self.never(name, step.runs[0].gives)
            steps[name] = replace(step, stops={self.one(sorted(targets)): never})
        others = [other for other in steps if other != name]
        if others and self.often(20):
            other = self.one(others)
            never = self.never(other, steps[other].runs[0].gives)
            steps[other] = replace(steps[other], stops={**steps[other].stops, name: never})
            steps[name] = replace(steps[name], stopped=not flow.streams(name))

    def never(self, name: str, gives: Kind) -> Expression:
        kind = gives.sure
        if kind.of:
            return Compare(Length(Path(name, (), kind)), ">", Constant(99))
        if kind == MAPPING:
            return Compare(MODE, "==", Constant("never"))
        return Compare(Path(name, ("n",) if kind in {NUM, BAG} else (), INT), ">", Constant(99))

    def levels(self, scope: Mapping[str, Kind], flow: Flow) -> dict[str, Path]:
        lists = [path for path in paths(scope) if path.kind.name == "list"]
        if not lists or not self.often(65):
            return {}
        streaming = [path for path in lists if flow.streams(path.root)]
        if streaming and self.often(50):
            return {"item": streaming[-1]}
        outer = self.one(lists)
        if not self.often(35):
            return {self.one(["item", "one"]): outer}
        assert outer.kind.of is not None
        inside = [path for path in paths({"outer": outer.kind.of.sure}) if path.kind.name == "list"]
        if not inside or self.often(20):
            inside = lists
        return {"outer": outer, "inner": self.one(inside)}

    def args(
        self, here: Mapping[str, Kind], levels: Mapping[str, Path], *, first: bool
    ) -> tuple[dict[str, Expression], Literal["default", "input", "inputs"]]:
        """A step's inputs, and the key of the YAML that gives them."""
        innermost = list(levels)[-1] if levels else "request"
        default = Path(innermost, (), here[innermost])
        known = paths(here)
        near = [path for path in known if path.root in (levels or list(here)[-3:])]
        value = default if first or (levels and self.often(70)) else self.one(near if self.often(50) else known)
        if self.often(45):
            args: dict[str, Expression] = {"x": value}
            for name in "yz"[: self.upto(2)]:
                args[name] = Constant(self.upto(9)) if self.often(15) else self.one(near if self.often(50) else known)
            return args | ({"tag": TAG} if self.often(90) else {}), "inputs"
        return {"x": value}, "default" if value == default and not self.often(30) else "input"

    # What it runs.

    def run(
        self,
        name: str,
        args: Mapping[str, Expression],
        form: str,
        deeper: int,
        fails: int,
        *,
        most_deep: int,
        yields: bool,
    ) -> Run:
        if form != "inputs" and not yields:
            (value,) = args.values()
            fitting = [one for one, op in HANDLERS.items() if op.takes["item"] == value.kind.sure]
            if fitting and self.often(35):
                return Run(handler=self.one(fitting), batch=self.one([None, 1, 2, 5]))
            if deeper and value.kind.sure in {NUM, BAG} and self.often(50):
                inner = self.flow(f"flow_{name}", f"{name}_", deeper - 1, 3, value.kind.sure, fails)
                if inner.answer.depth <= most_deep:
                    return Run(flow=inner, batch=self.one([None, 1, 2]))
        return Run(self.function(f"do_{name}", args, self.kind(0 if yields else most_deep), fails, yields=yields))

    def switch(
        self, name: str, main: Run, args: Mapping[str, Expression], here: Mapping[str, Kind], fails: int
    ) -> tuple[Run, ...]:
        count = 2 + self.upto(1)
        others = [Run(self.function(f"do_{name}_case{i}", args, main.gives, fails)) for i in range(1, count)]
        runs = [main, *others]
        if self.often(50):
            runs.reverse()
        without_when = self.often(50)
        return tuple(
            Run(
                run.op,
                run.handler,
                run.flow,
                run.batch,
                None if without_when and i == count - 1 else self.condition(here),
            )
            for i, run in enumerate(runs)
        )

    def kind(self, most_deep: int) -> Kind:
        options = [NUM, NUM, BAG, INT, NUM.skipping()]
        if most_deep >= 1:
            options += [listing(NUM), listing(NUM), listing(BAG), listing(NUM.skipping()), listing(NUM).skipping()]
        if most_deep >= 2:
            options += [listing(listing(NUM)), listing(listing(NUM).skipping())]
        return self.one(options)

    def function(
        self, name: str, args: Mapping[str, Expression], gives: Kind, fails: int, *, yields: bool = False
    ) -> Op:
        takes = {
            parameter: value.kind.skipping(value.kind.skips and self.often(50))
            for parameter, value in args.items()
            if parameter != "tag"
        }
        fates = {}
        if self.often(fails):
            fates = {self.upto(9): self.fate() for _ in range(1 + self.upto(3))}
        return Op(name, takes, gives, fates, slow=self.often(25), yields=yields)

    def fate(self) -> Fate:
        how = self.one(["flaky", "refuse", "raise", "exit"])
        if how == "flaky":
            return Fate("flaky", 1 + self.upto(1))
        return Fate("refuse", self.one([422, 400, 404])) if how == "refuse" else Fate(how)  # type: ignore[arg-type]

    def condition(self, here: Mapping[str, Kind], deep: int = 2) -> Expression:
        word = self.one(["", "", "", "not", "and", "or"]) if deep else ""
        if word == "not":
            return Logic("not", (self.condition(here, deep - 1),))
        if word:
            return Logic(word, (self.condition(here, deep - 1), self.condition(here, deep - 1)))  # type: ignore[arg-type]
        atoms = [path for path in paths(here) if path.kind in {INT, FLAG, INT.skipping()} or path.kind.sure.of]
        atoms = [path for path in atoms if path.kind.name != "list" or not path.kind.skips]
        atom = self.one([*atoms, MODE])
        if atom is MODE:
            return Compare(atom, self.one(["==", "!="]), Constant(self.one(["a", "b"])))
        if atom.kind == FLAG:
            return atom
        if atom.kind.of:
            return Compare(Length(atom), self.one(list(SIGNS)), Constant(self.upto(3)))
        sign = self.one(["==", "!="] if atom.kind.skips else [">", "<=", "<", ">=", "==", "!="])
        return Compare(atom, sign, Constant(self.upto(9)))


def ended_before(step: Step, flow: Flow) -> set[str]:
    """The steps that have ended before a step has its first answer."""
    sources = {*step.fed, *([step.could_follow] if step.could_follow else [])} & flow.steps.keys()
    ended = set(flow.needed(sorted(step.roots - sources), stoppers=False))
    for source in sources:
        ended |= ended_before(flow.steps[source], flow)
    return ended
