"""From a workflow's file to its graph: everything that can be wrong is found here, before anything runs."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from torchserve_dag import plain, source
from torchserve_dag.engine.expression import Expression, ExpressionError, compile_expression, names_in
from torchserve_dag.engine.graph import REQUEST, Graph, Node
from torchserve_dag.engine.types import fits, includes, without
from torchserve_dag.engine.workflow_file import NodeFile, WorkflowFile
from torchserve_dag.handler import types_of
from torchserve_dag.handler_file import HandlerFile
from torchserve_dag.messages import Skipped
from torchserve_dag.project import Project, import_file
from torchserve_dag.source import CheckError, Problem, Source


def check(project: Project, path: Path) -> Graph:
    """The graph of the workflow file at `path`. Raises CheckError with everything that is wrong in it."""
    return _Check(project, source.read(path, WorkflowFile)).graph()


@dataclass(frozen=True)
class _Code:
    """What a node runs: the types of its parameters, and of its answer for one item."""

    takes: Mapping[str, Any]
    optional: frozenset[str]
    gives: Any
    handler: Source[HandlerFile] | None = None
    function: Callable[..., Any] | None = None


class _Check:
    def __init__(self, project: Project, file: Source[WorkflowFile]) -> None:
        self.project = project
        self.source = file
        self.file = file.value
        self.problems: list[Problem] = []

    def graph(self) -> Graph:
        functions_path = self._functions_path()
        code = {name: self._code(name, node, functions_path) for name, node in self.file.nodes.items()}
        inputs = {name: self._inputs(name, node, one) for name, node in self.file.nodes.items() if (one := code[name])}
        self._stop()
        needs = {name: self._needs(name, node, inputs[name]) for name, node in self.file.nodes.items()}
        self._stop()
        order = self._order(needs)
        self._reach(needs)
        self._stop()
        known = {name: one for name, one in code.items() if one}
        request = self._request_type(inputs, known)
        self._stop()
        nodes = self._typed(order, needs, inputs, known, request)
        self._stop()
        return Graph(
            self.file.name,
            self.file.version,
            self.file.does,
            self.source.path,
            functions_path,
            request,
            nodes,
            self.file.output,
            self.file.serve,
        )

    def _stop(self) -> None:
        if self.problems:
            raise CheckError(self.problems)

    def _problem(self, path: tuple[str, ...], what: str, help: str = "") -> None:  # noqa: A002
        self.problems.append(self.source.problem(("nodes", *path), f"{path[0]}: {what}", help))

    def _functions_path(self) -> Path | None:
        if not any(node.function for node in self.file.nodes.values()):
            return None
        return self.source.path.parent / self.file.code_file

    def _code(self, name: str, node: NodeFile, functions_path: Path | None) -> _Code | None:
        if node.handler is not None:
            return self._handler(name, node)
        return self._function(name, str(node.function), functions_path)

    def _handler(self, name: str, node: NodeFile) -> _Code | None:
        reference = str(node.handler)
        path = self.project.find("handlers", reference)
        if path is None:
            hint = plain.did_you_mean(reference, self.project.references("handlers"))
            self._problem((name, "handler"), f'there is no handler "{reference}"', hint)
            return None
        try:
            file = self.project.read_handler(path)
            kind = self.project.handler_class(file)
            self.project.settings(file, kind)
        except CheckError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None
        takes, gives = types_of(kind)
        return _Code({"item": takes}, frozenset(), gives, handler=file)

    def _function(self, name: str, function: str, path: Path | None) -> _Code | None:
        if path is None or not path.is_file():
            self._problem((name, "function"), f"there is no {path}", f"write the function {function} there")
            return None
        try:
            module = import_file(path)
        except CheckError as error:
            self.problems += [problem for problem in error.problems if problem not in self.problems]
            return None
        found = getattr(module, function, None)
        if not inspect.isfunction(found):
            known = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
            self._problem(
                (name, "function"), f'{path} has no function "{function}"', plain.did_you_mean(function, known)
            )
            return None
        return self._signature(name, found)

    def _signature(self, name: str, function: Callable[..., Any]) -> _Code | None:
        called, path = function.__name__, (name, "function")
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError) as error:
            self._problem(path, f"the annotations of {called}: {error}")
            return None
        parameters = inspect.signature(function).parameters
        before = len(self.problems)
        if inspect.iscoroutinefunction(function):
            self._problem(path, f"{called} is a coroutine", "write def, without async")
        for one in parameters.values():
            if one.kind not in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}:
                what = f"{called}'s parameter {one.name} cannot be given by its name"
                self._problem(path, what, "write it without * and /")
        untyped = [p for p in (*parameters, "return") if p not in hints]
        if untyped:
            self._problem(path, f"{called} does not say the type of {', '.join(untyped)}", "annotate it")
        if len(self.problems) > before:
            return None
        optional = frozenset(p for p, v in parameters.items() if v.default is not inspect.Parameter.empty)
        return _Code({p: hints[p] for p in parameters}, optional, hints["return"], function=function)

    def _inputs(self, name: str, node: NodeFile, code: _Code) -> dict[str, str]:
        """Each parameter's expression, as text."""
        if node.inputs:
            for unknown in node.inputs.keys() - code.takes.keys():
                hint = plain.did_you_mean(unknown, list(code.takes))
                self._problem((name, "inputs", unknown), f'{node.function} has no parameter "{unknown}"', hint)
            for missing in code.takes.keys() - node.inputs.keys() - code.optional:
                self._problem((name, "inputs"), f'the parameter "{missing}" of {node.function} gets nothing')
            return {p: text for p, text in node.inputs.items() if p in code.takes}
        wanted = [p for p in code.takes if p not in code.optional] or list(code.takes)[:1]
        if len(wanted) != 1:
            listed = ", ".join(code.takes)
            if listed:
                self._problem((name,), f"{node.function} takes {listed}", "say what each gets, under inputs")
            else:
                self._problem((name, "function"), f"{node.function} takes nothing", "give it a parameter")
            return {}
        return {wanted[0]: node.input or ("item" if node.each else REQUEST)}

    def _needs(self, name: str, node: NodeFile, inputs: Mapping[str, str]) -> frozenset[str]:
        """The nodes that a node's expressions read."""
        known = {*self.file.nodes, REQUEST, "parameters"}
        needs: set[str] = set()
        for path, text in self._texts(name, node, inputs):
            try:
                names = names_in(text)
            except ExpressionError as error:
                self._problem(path, error.what, error.help)
                continue
            if "item" in names and (node.each is None or path[1:] == ("each",)):
                self._problem(path, f'"{text}" reads item, and there is no item here', "a node with each has one")
            for unknown in sorted(names - known - {"item"}):
                self._problem(path, f'there is no node "{unknown}"', plain.did_you_mean(unknown, sorted(known)))
            needs |= names & {*self.file.nodes, REQUEST}
        return frozenset(needs)

    @staticmethod
    def _texts(name: str, node: NodeFile, inputs: Mapping[str, str]) -> list[tuple[tuple[str, ...], str]]:
        texts: list[tuple[tuple[str, ...], str]]
        texts = [((name, "inputs", p) if node.inputs else (name, "input"), text) for p, text in inputs.items()]
        texts += [((name, key), text) for key in ("each", "when") if (text := getattr(node, key)) is not None]
        return texts

    def _order(self, needs: Mapping[str, frozenset[str]]) -> list[str]:
        try:
            order = list(TopologicalSorter({name: sorted(before) for name, before in needs.items()}).static_order())
        except CycleError as error:
            circle = error.args[1]
            self._problem((circle[0],), f"these nodes wait for each other: {' -> '.join(reversed(circle))}")
            return []
        return [name for name in order if name != REQUEST]

    def _reach(self, needs: Mapping[str, frozenset[str]]) -> None:
        output = self.file.output
        if output not in self.file.nodes:
            hint = plain.did_you_mean(output, list(self.file.nodes))
            self.problems.append(self.source.problem(("output",), f'output: there is no node "{output}"', hint))
            return
        used, todo = set(), [output]
        while todo:
            name = todo.pop()
            if name not in used and name != REQUEST:
                used.add(name)
                todo += needs[name]
        for name in self.file.nodes:
            if name not in used:
                self._problem(
                    (name,), f'nothing reads it on the way to the output, "{output}"', "read it, or remove it"
                )
        if not self.problems and not any(REQUEST in before for before in needs.values()):
            self.problems.append(
                self.source.problem(("nodes",), "no node reads the request", "begin with input: request")
            )

    def _request_type(self, inputs: Mapping[str, Mapping[str, str]], code: Mapping[str, _Code]) -> Any:
        """What the nodes that take the request as it is want it to be."""
        wants = [
            (name, without(code[name].takes[p], Skipped))
            for name, texts in inputs.items()
            for p, text in texts.items()
            if text.strip() == REQUEST
        ]
        if not wants:
            self.problems.append(
                self.source.problem(("nodes",), "no node takes the request as it is, so its type is not known")
            )
            return Any
        first, kind = wants[0]
        for name, want in wants[1:]:
            if fits(want, kind):
                kind = want
            elif not fits(kind, want):
                self._problem(
                    (name,), f"takes the request as {plain.name_of(want)}, and {first} as {plain.name_of(kind)}"
                )
        return kind

    def _typed(
        self,
        order: list[str],
        needs: Mapping[str, frozenset[str]],
        inputs: Mapping[str, Mapping[str, str]],
        code: Mapping[str, _Code],
        request: Any,
    ) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        scope: dict[str, Any] = {REQUEST: request, "parameters": dict[str, str]}
        for name in order:
            node = self._node(name, needs[name], inputs[name], code[name], scope, nodes)
            if node is None:
                return nodes  # what follows would only repeat the mistake
            nodes[name] = node
            scope[name] = node.result
        return nodes

    def _node(
        self,
        name: str,
        needs: frozenset[str],
        inputs: Mapping[str, str],
        code: _Code,
        scope: Mapping[str, Any],
        before: Mapping[str, Node],
    ) -> Node | None:
        file = self.file.nodes[name]
        problems = len(self.problems)
        each, may_skip, here = None, file.when is not None, dict(scope)
        if file.each is not None:
            each = self._expression((name, "each"), file.each, scope)
            if each is None:
                return None
            kind = without(each.type, Skipped)
            if typing.get_origin(kind) is not list:
                hint = "say what is in it, like list[str]" if kind is list else ""
                self._problem((name, "each"), f'"{file.each}" is {plain.name_of(kind)}, where a list is meant', hint)
                return None
            here["item"] = typing.get_args(kind)[0]
            may_skip = may_skip or includes(here["item"], Skipped)
        when = self._expression((name, "when"), file.when, here) if file.when is not None else None
        if when is not None and when.type is not bool:
            self._problem((name, "when"), f'"{file.when}" is {plain.name_of(when.type)}, where true or false is meant')
        takes: dict[str, Expression] = {}
        sees_skipped: set[str] = set()
        for parameter, text in inputs.items():
            path = (name, "inputs", parameter) if file.inputs else (name, "input")
            value = self._expression(path, text, here)
            if value is None:
                continue
            takes[parameter] = value
            want = code.takes[parameter]
            if fits(Skipped, want) and want is not Any:
                sees_skipped.add(parameter)
            elif includes(value.type, Skipped):
                may_skip = True
            self._edge(path, text, value.type, want)
        if len(self.problems) > problems:
            return None
        gives = code.gives | Skipped if may_skip else code.gives
        run = code.handler.value.run if code.handler else None
        return Node(
            name=name,
            takes=takes,
            each=each,
            when=when,
            sees_skipped=frozenset(sees_skipped),
            result=_result(each, gives),
            needs=needs or frozenset({REQUEST}),  # what reads only parameters begins with the request
            depth=1 + max((before[need].depth for need in needs if need != REQUEST), default=0),
            handler=code.handler,
            function=code.function,
            batch=file.batch or (run.batch if run else 1),
            device=file.device or (run.device if run else None),
        )

    def _edge(self, path: tuple[str, ...], text: str, have: Any, want: Any) -> None:
        if fits(without(have, Skipped), want) or fits(have, want):
            return
        hint = ""
        if fits(have, list[Any]) and fits(Skipped, (typing.get_args(have) or (None,))[0]):
            hint = "its items may be skipped: take list[... | Skipped]"
        self._problem(path, f'takes {plain.name_of(want)}, and "{text}" is {plain.name_of(have)}', hint)

    def _expression(self, path: tuple[str, ...], text: str, scope: Mapping[str, Any]) -> Expression | None:
        try:
            return compile_expression(text, scope)
        except ExpressionError as error:
            self._problem(path, error.what, error.help)
            return None


def _result(each: Expression | None, gives: Any) -> Any:
    if each is None:
        return gives
    # A list that is itself skipped (its node's `when` said no) skips the whole node.
    return list[gives] | Skipped if includes(each.type, Skipped) else list[gives]
