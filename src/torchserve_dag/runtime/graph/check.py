"""From a workflow's file to its graph: everything that can be wrong is found here, before anything runs."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.data.source import Source
from torchserve_dag.runtime.graph.expression import Expression, ExpressionError, compile_expression, names_in
from torchserve_dag.runtime.graph.finder import ONE, Finder, Signature
from torchserve_dag.runtime.graph.graph import REQUEST, Branch, Code, Graph, Level, Node, Output, Policy
from torchserve_dag.runtime.graph.kinds import FunctionCode
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.types import fits, includes, union, without
from torchserve_dag.runtime.messages import Skipped
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.workflow_file import CodeFile, NodeFile, OtherwiseFile, WorkflowFile

PARAMETERS = "parameters"


def check(project: Project, file: Source[WorkflowFile], inner: Callable[[Path], Graph]) -> Graph:
    """The graph of a workflow's file. `inner` gives that of a workflow inside, by its file.

    Raises CheckError with everything wrong in it.
    """
    return _Check(project, file, inner).graph()


@dataclass
class _Run:
    """One thing that a node may run: where the file says so, what was found, and what each parameter gets."""

    place: Place
    name: str
    file: CodeFile
    when: str | None
    found: Signature
    inputs: dict[str, str] = field(default_factory=dict)
    """Each parameter's expression, as text."""


@dataclass
class _Reading:
    """A node half-way: what it may run, and the nodes that it reads."""

    file: NodeFile
    runs: list[_Run]
    fallback: _Run | None = None
    needs: frozenset[str] = frozenset()

    @property
    def all(self) -> list[_Run]:
        return [*self.runs, self.fallback] if self.fallback else self.runs

    @property
    def yields(self) -> bool:
        return self.runs[0].found.yields


class _Check:
    def __init__(self, project: Project, file: Source[WorkflowFile], inner: Callable[[Path], Graph]) -> None:
        self.source = file
        self.file = file.value
        self.problems = Problems(file)
        self.finder = Finder(project, self.file, file.path, self.problems, inner)

    def graph(self) -> Graph:
        readings = {name: reading for name, node in self.file.nodes.items() if (reading := self._reading(name, node))}
        self.problems.stop()
        for name, reading in readings.items():
            reading.needs = self._needs(name, reading)
        outputs = {"": self.file.output} if isinstance(self.file.output, str) else self.file.output
        wanted = self._wanted(outputs)
        self.problems.stop()
        order = self._order(readings)
        self._reach(readings, wanted)
        self.problems.stop()
        request = self._request_type(readings)
        self.problems.stop()
        scope: dict[str, Any] = {REQUEST: request, PARAMETERS: dict[str, str]}
        nodes: dict[str, Node] = {}
        for name in order:
            node = self._node(name, readings[name], scope, nodes)
            if node is None:
                break  # what follows would only repeat the mistake
            nodes[name] = node
            scope[name] = node.result
        self.problems.stop()
        output = self._output(outputs, scope)
        self.problems.stop()
        uses_functions = any(
            isinstance(run.found.kind, FunctionCode) for reading in readings.values() for run in reading.all
        )
        return Graph(
            self.file.name,
            self.file.version,
            self.file.does,
            self.source.path,
            self.finder.functions_path if uses_functions else None,
            request,
            nodes,
            output,
            self.file.serve,
        )

    # What each node may run, and what that takes.

    def _reading(self, name: str, node: NodeFile) -> _Reading | None:
        for level in node.levels:
            if level in self.file.nodes:
                self.problems.add((name, "each", level), f'"{level}" is a node already', "call the element otherwise")
        if node.switch is None:
            runs = [self._run((name,), name, node, node, None)]
        else:
            runs = [
                self._run((name, "switch", i), f"{name}.{_branch_name(branch, i)}", branch, node, branch.when)
                for i, branch in enumerate(node.switch)
            ]
            names = [run.name for run in runs if run]
            taken = [*names, f"{name}.fallback"]
            if len(set(taken)) < len(taken):  # two would be one in the engine's and the metrics' eyes
                for i, run in enumerate(runs):
                    if run:
                        run.name = f"{run.name}_{i + 1}"
        reading = _Reading(node, [run for run in runs if run])
        if isinstance(node.on_error, OtherwiseFile) and node.on_error.fallback:
            place = (name, "on_error", "fallback")
            reading.fallback = self._run(place, f"{name}.fallback", node.on_error.fallback, node, None)
        if None in runs or not runs:
            return None
        self._check_yields(name, reading)
        return reading

    def _run(self, place: Place, name: str, code: CodeFile, node: NodeFile, when: str | None) -> _Run | None:
        found = self.finder.find(place, code)
        if found is None:
            return None
        run = _Run(place, name, code, when, found)
        run.inputs = self._inputs(run, node)
        return run

    def _inputs(self, run: _Run, node: NodeFile) -> dict[str, str]:
        found, name = run.found, str(run.place[0])
        if node.inputs:
            if not found.kind.by_name:
                self.problems.add((name, "inputs"), f"{found.called} takes one input", "write input")
                return {}
            for unknown in node.inputs.keys() - found.takes.keys():
                hint = plain.did_you_mean(unknown, list(found.takes))
                self.problems.add((name, "inputs", unknown), f'{found.called} has no parameter "{unknown}"', hint)
            for missing in found.takes.keys() - node.inputs.keys() - found.optional:
                self.problems.add((name, "inputs"), f'the parameter "{missing}" of {found.called} gets nothing')
            return {p: text for p, text in node.inputs.items() if p in found.takes}
        wanted = [p for p in found.takes if p not in found.optional] or list(found.takes)[:1]
        if len(wanted) != 1:
            listed = ", ".join(found.takes)
            if listed:
                self.problems.add(run.place, f"{found.called} takes {listed}", "say what each gets, under inputs")
            else:
                self.problems.add((*run.place, "function"), f"{found.called} takes nothing", "give it a parameter")
            return {}
        return {wanted[0]: node.input or (list(node.levels)[-1] if node.levels else REQUEST)}

    def _check_yields(self, name: str, reading: _Reading) -> None:
        yielding = [run for run in reading.all if run.found.yields]
        if not yielding:
            return
        called = yielding[0].found.called
        if len(reading.all) > 1:
            self.problems.add((name,), f"{called} yields, so it cannot be one of several", "give it a node of its own")
        if reading.file.levels:
            what = f"{called} yields, so it runs once for a request, not for each item"
            self.problems.add((name, "each"), what, "let a function after it take its pieces, with each")
        if reading.file.retry or reading.file.on_error != "fail":
            key = "retry" if reading.file.retry else "on_error"
            self.problems.add((name, key), f"{called} yields: its first pieces are with the client when it fails")

    # Which nodes each reads.

    def _needs(self, name: str, reading: _Reading) -> frozenset[str]:
        levels = list(reading.file.levels)
        needs: set[str] = set()
        for place, text, seen in self._texts(name, reading):
            needs |= self._names(place, text, levels[:seen], levels)
        return frozenset(needs)

    @staticmethod
    def _texts(name: str, reading: _Reading) -> Iterator[tuple[Place, str, int]]:
        """Each expression: where it is, its text, and how many of the node's loops it is inside of."""
        file = reading.file
        for i, (level, text) in enumerate(file.levels.items()):
            yield ((name, "each", level) if isinstance(file.each, dict) else (name, "each")), text, i
        depth = len(file.levels)
        if file.when is not None:
            yield (name, "when"), file.when, depth
        for run in reading.all:
            if run.when is not None:
                yield (*run.place, "when"), run.when, depth
            for parameter, text in run.inputs.items():
                yield ((name, "inputs", parameter) if file.inputs else (name, "input")), text, depth

    def _names(self, place: Place, text: str, seen: list[str], levels: list[str]) -> set[str]:
        """The nodes that an expression reads, and the request."""
        known = {*self.file.nodes, REQUEST, PARAMETERS, *seen}
        try:
            names = names_in(text)
        except ExpressionError as error:
            self.problems.add(place, error.what, error.help)
            return set()
        for unknown in sorted(names - known):
            if unknown == ONE or unknown in levels:
                what = f'"{text}" reads {unknown}, and there is no {unknown} here'
                self._once(place, what, "a node with each has one")
            else:
                self._once(place, f'there is no node "{unknown}"', plain.did_you_mean(unknown, sorted(known)))
        return set(names & {*self.file.nodes, REQUEST} - {*seen})

    def _once(self, place: Place, what: str, help: str) -> None:  # noqa: A002
        """A problem that several of a node's codes may have in common."""
        self.problems.add(place, what, help)
        if self.problems.found[-1] in self.problems.found[:-1]:
            self.problems.found.pop()

    def _wanted(self, outputs: Mapping[str, str]) -> frozenset[str]:
        wanted: set[str] = set()
        for name, text in outputs.items():
            path = ("output", name) if name else ("output",)
            try:
                names = names_in(text)
            except ExpressionError as error:
                self.problems.add_at(path, f"output: {error.what}", error.help)
                continue
            for unknown in sorted(names - {*self.file.nodes, REQUEST, PARAMETERS}):
                hint = plain.did_you_mean(unknown, list(self.file.nodes))
                self.problems.add_at(path, f'output: there is no node "{unknown}"', hint)
            wanted |= names
        return frozenset(wanted)

    def _order(self, readings: Mapping[str, _Reading]) -> list[str]:
        graph = {name: sorted(reading.needs) for name, reading in readings.items()}
        try:
            order = list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            circle = error.args[1]
            self.problems.add((circle[0],), f"these nodes wait for each other: {' -> '.join(reversed(circle))}")
            return []
        return [name for name in order if name != REQUEST]

    def _reach(self, readings: Mapping[str, _Reading], wanted: frozenset[str]) -> None:
        used: set[str] = set()
        todo = list(wanted)
        while todo:
            name = todo.pop()
            if name in readings and name not in used:
                used.add(name)
                todo += readings[name].needs
        shown = self.file.output if isinstance(self.file.output, str) else ", ".join(self.file.output.values())
        for name in self.file.nodes:
            if name not in used:
                what = f'nothing reads it on the way to the output, "{shown}"'
                self.problems.add((name,), what, "read it, or remove it")
        if not len(self.problems) and not any(REQUEST in reading.needs for reading in readings.values()):
            self.problems.add_at(("nodes",), "no node reads the request", "begin with input: request")

    # Types.

    def _request_type(self, readings: Mapping[str, _Reading]) -> Any:
        """What the nodes that take the request as it is want it to be."""
        wants = [
            (name, without(run.found.takes[parameter], Skipped))
            for name, reading in readings.items()
            for run in reading.all
            for parameter, text in run.inputs.items()
            if text.strip() == REQUEST
        ]
        if not wants:
            self.problems.add_at(("nodes",), "no node takes the request as it is, so its type is not known")
            return Any
        first, kind = wants[0]
        for name, want in wants[1:]:
            if kind is Any or fits(want, kind):
                kind = want if want is not Any else kind
            elif not fits(kind, want):
                what = f"takes the request as {plain.name_of(want)}, and {first} as {plain.name_of(kind)}"
                self.problems.add((name,), what)
        return kind

    def _node(self, name: str, reading: _Reading, scope: Mapping[str, Any], before: Mapping[str, Node]) -> Node | None:
        file = reading.file
        here, may_skip, each = dict(scope), file.when is not None, []
        for level, text in file.levels.items():
            place = (name, "each", level) if isinstance(file.each, dict) else (name, "each")
            elements = self._list(place, text, here)
            if elements is None:
                return None
            each.append(Level(level, elements))
            (element,) = typing.get_args(without(elements.type, Skipped))
            here[level] = without(element, Skipped)  # a skipped element's answer is skipped, and nothing is read of it
        when = self._condition((name, "when"), file.when, here)
        branches = []
        for run in reading.runs:
            condition = self._condition((*run.place, "when"), run.when, here)
            branches.append(Branch(condition, self._code(run, file, here)))
        may_skip = may_skip or branches[-1].when is not None
        fallback = self._code(reading.fallback, file, here) if reading.fallback else None
        follows = self._follows(name, reading, each, before)
        if len(self.problems):
            return None
        gives = union([code.gives for code in [b.code for b in branches] + ([fallback] if fallback else [])])
        may_skip = may_skip or any(self._skips(code) for branch in branches for code in [branch.code])
        policy = self._policy(name, file, gives, fallback)
        if len(self.problems):
            return None
        if may_skip or policy.on_error == "skip":
            gives = union([gives, Skipped])
        result = _result(each, gives)
        if reading.yields:
            result = list[branches[0].code.gives]  # type: ignore[misc]
            result = union([result, Skipped]) if may_skip else result
        return Node(
            name=name,
            branches=tuple(branches),
            each=tuple(each),
            when=when,
            result=result,
            needs=reading.needs or frozenset({REQUEST}),  # what reads only parameters begins with the request
            depth=1 + max((before[need].depth for need in reading.needs if need != REQUEST), default=0),
            policy=policy,
            follows=follows,
        )

    def _list(self, place: Place, text: str, scope: Mapping[str, Any]) -> Expression | None:
        value = self._expression(place, text, scope)
        if value is None:
            return None
        kind = without(value.type, Skipped)
        if typing.get_origin(kind) is not list:
            hint = "say what is in it, like list[str]" if kind is list else ""
            self.problems.add(place, f'"{text}" is {plain.name_of(kind)}, where a list is meant', hint)
            return None
        return value

    def _condition(self, place: Place, text: str | None, scope: Mapping[str, Any]) -> Expression | None:
        if text is None:
            return None
        value = self._expression(place, text, scope)
        if value is not None and value.type is not bool:
            self.problems.add(place, f'"{text}" is {plain.name_of(value.type)}, where true or false is meant')
        return value

    def _code(self, run: _Run, node: NodeFile, scope: Mapping[str, Any]) -> Code:
        found = run.found
        takes: dict[str, Expression] = {}
        sees_skipped: set[str] = set()
        for parameter, text in run.inputs.items():
            name = str(run.place[0])
            place = (name, "inputs", parameter) if node.inputs else (name, "input")
            value = self._expression(place, text, scope)
            if value is None:
                continue
            takes[parameter] = value
            want = found.takes[parameter]
            if fits(Skipped, want) and want is not Any:
                sees_skipped.add(parameter)
            self._edge(place, text, value.type, want)
        return Code(
            name=run.name,
            takes=takes,
            sees_skipped=frozenset(sees_skipped),
            gives=found.gives,
            kind=found.kind,
            batch=run.file.batch or found.kind.batch,
            yields=found.yields,
        )

    @staticmethod
    def _skips(code: Code) -> bool:
        """Whether a skipped input skips the item."""
        return any(includes(value.type, Skipped) and p not in code.sees_skipped for p, value in code.takes.items())

    def _follows(self, name: str, reading: _Reading, each: list[Level], before: Mapping[str, Node]) -> str | None:
        """The yielding node whose pieces a node takes one by one, as they come."""
        if len(each) != 1:
            return None
        node = each[0].list.text.strip()
        others = [text for place, text, _ in self._texts(name, reading) if place[1:2] != ("each",)]
        if node not in before or not before[node].streams or any(node in names_in(text) for text in others):
            return None
        return node

    def _policy(self, name: str, file: NodeFile, gives: Any, fallback: Code | None) -> Policy:
        if not isinstance(file.on_error, OtherwiseFile):
            return Policy(file.timeout_s, file.retry, file.on_error)
        if fallback:
            return Policy(file.timeout_s, file.retry, "fallback", fallback=fallback)
        default = None
        try:
            default = plain.build(gives, file.on_error.default)
        except plain.WrongDataError as error:
            for wrong in error.wrongs:
                place = (name, "on_error", "default", *wrong.path)
                self.problems.add(place, f"the default is not {plain.name_of(gives)}: {wrong.what}", wrong.help)
        return Policy(file.timeout_s, file.retry, "default", default)

    def _edge(self, place: Place, text: str, have: Any, want: Any) -> None:
        if fits(without(have, Skipped), want) or fits(have, want):
            return
        hint = ""
        if fits(have, list[Any]) and fits(Skipped, (typing.get_args(have) or (None,))[0]):
            hint = "its items may be skipped: take list[... | Skipped]"
        self._once(place, f'takes {plain.name_of(want)}, and "{text}" is {plain.name_of(have)}', hint)

    def _expression(self, place: Place, text: str, scope: Mapping[str, Any]) -> Expression | None:
        try:
            return compile_expression(text, scope)
        except ExpressionError as error:
            self._once(place, error.what, error.help)
            return None

    def _output(self, outputs: Mapping[str, str], scope: Mapping[str, Any]) -> Output:
        values = {}
        for name, text in outputs.items():
            path = ("output", name) if name else ("output",)
            try:
                values[name] = compile_expression(text, scope)
            except ExpressionError as error:
                self.problems.add_at(path, f"output: {error.what}", error.help)
        return Output(values)


def _branch_name(branch: CodeFile, index: int) -> str:
    served = branch.served.model if branch.served else None
    archive = Path(branch.torchserve.archive).stem if branch.torchserve else None
    text = branch.handler or branch.function or branch.workflow or served or archive or str(index)
    return text.replace("/", "_").replace(".", "_")


def _result(each: list[Level], gives: Any) -> Any:
    """A list for each loop; an element or a list that is itself skipped skips what is inside."""
    for level in reversed(each):
        (element,) = typing.get_args(without(level.list.type, Skipped))
        inside = union([gives, Skipped]) if includes(element, Skipped) else gives
        gives = list[inside]  # type: ignore[valid-type]
        gives = union([gives, Skipped]) if includes(level.list.type, Skipped) else gives
    return gives
