"""The third step of a check: each node with its expressions compiled and the type of its result."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.dependencies import expressions
from torchserve_dag.runtime.graph.drafts import Draft, DraftCode
from torchserve_dag.runtime.graph.expression import Expression, ExpressionError, compile_expression, names_in
from torchserve_dag.runtime.graph.graph import REQUEST, Branch, Code, Level, Node
from torchserve_dag.runtime.graph.policies import policy_of
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.types import fits, includes, union, without
from torchserve_dag.runtime.messages import Skipped

Scope = Mapping[str, Any]
"""The type of each name that an expression may read."""


class NodeTyper:
    """Makes nodes from drafts. Mistakes are added to `problems`."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def request_type(self, drafts: Mapping[str, Draft]) -> Any:
        """The type of the request, on which all nodes that read the whole request must agree."""
        wants = [
            (name, without(code.signature.takes[parameter], Skipped))
            for name, draft in drafts.items()
            for code in draft.all
            for parameter, text in code.inputs.items()
            if text.strip() == REQUEST
        ]
        if not wants:
            what = "no node takes the request as it is, so its type is not known"
            self._problems.add_at(("nodes",), what)
            return Any
        first, kind = wants[0]
        for name, want in wants[1:]:
            if kind is Any or fits(want, kind):
                kind = want if want is not Any else kind
            elif not fits(kind, want):
                what = f"takes the request as {plain.name_of(want)}, and {first} as {plain.name_of(kind)}"
                self._problems.add((name,), what)
        return kind

    def node(self, draft: Draft, scope: Scope, before: Mapping[str, Node]) -> Node | None:
        """The typed node; None if there are problems, which are added. `before`: the nodes that it may read."""
        loops = self._levels(draft, scope)
        if loops is None:
            return None
        each, inside = loops
        name, file = draft.name, draft.file
        when = self._condition((name, "when"), file.when, inside)
        branches = tuple(
            Branch(self._condition((*code.place, "when"), code.when, inside), self._code(code, draft, inside))
            for code in draft.branches
        )
        fallback = self._code(draft.fallback, draft, inside) if draft.fallback else None
        follows = _follows(draft, each, before)
        if len(self._problems):
            return None
        codes = [branch.code for branch in branches]
        gives = union([code.gives for code in ([*codes, fallback] if fallback else codes)])
        policy = policy_of(name, file, gives, fallback, self._problems)
        if len(self._problems):
            return None
        may_skip = when is not None or branches[-1].when is not None or any(map(_skips, codes))
        if draft.yields:
            result: Any = list[gives]  # type: ignore[valid-type]
            result = union([result, Skipped]) if may_skip else result
        else:
            result = _result(each, union([gives, Skipped]) if may_skip or policy.on_error == "skip" else gives)
        return Node(
            name=name,
            branches=branches,
            each=each,
            when=when,
            result=result,
            needs=draft.needs or frozenset({REQUEST}),  # a node that reads only parameters starts with the request
            depth=1 + max((before[need].depth for need in draft.needs if need != REQUEST), default=0),
            policy=policy,
            follows=follows,
        )

    def _levels(self, draft: Draft, scope: Scope) -> tuple[tuple[Level, ...], Scope] | None:
        """The node's loops, and the scope within the innermost."""
        inside, each = dict(scope), []
        for level, text in draft.file.levels.items():
            elements = self._list(draft.level_place(level), text, inside)
            if elements is None:
                return None
            each.append(Level(level, elements))
            (element,) = typing.get_args(without(elements.type, Skipped))
            inside[level] = without(element, Skipped)  # no code runs for a skipped element, so none sees a Skipped here
        return tuple(each), inside

    def _list(self, place: Place, text: str, scope: Scope) -> Expression | None:
        value = self._expression(place, text, scope)
        if value is None:
            return None
        kind = without(value.type, Skipped)
        if typing.get_origin(kind) is not list:
            hint = "say what is in it, like list[str]" if kind is list else ""
            self._problems.add(place, f'"{text}" is {plain.name_of(kind)}, where a list is meant', hint)
            return None
        return value

    def _condition(self, place: Place, text: str | None, scope: Scope) -> Expression | None:
        if text is None:
            return None
        value = self._expression(place, text, scope)
        if value is not None and value.type is not bool:
            self._problems.add(place, f'"{text}" is {plain.name_of(value.type)}, where true or false is meant')
        return value

    def _code(self, code: DraftCode, draft: Draft, scope: Scope) -> Code:
        signature = code.signature
        takes: dict[str, Expression] = {}
        sees_skipped: set[str] = set()
        for parameter, text in code.inputs.items():
            place = draft.input_place(parameter)
            value = self._expression(place, text, scope)
            if value is None:
                continue
            takes[parameter] = value
            want = signature.takes[parameter]
            if fits(Skipped, want) and want is not Any:
                sees_skipped.add(parameter)
            self._check_edge(place, text, value.type, want)
        return Code(
            name=code.name,
            takes=takes,
            sees_skipped=frozenset(sees_skipped),
            gives=signature.gives,
            kind=signature.kind,
            batch=code.file.batch or signature.kind.batch,
            yields=signature.yields,
        )

    def _check_edge(self, place: Place, text: str, have: Any, want: Any) -> None:
        if fits(without(have, Skipped), want) or fits(have, want):
            return
        hint = ""
        if fits(have, list[Any]) and fits(Skipped, (typing.get_args(have) or (None,))[0]):
            hint = "its items may be skipped: take list[... | Skipped]"
        self._problems.add_once(place, f'takes {plain.name_of(want)}, and "{text}" is {plain.name_of(have)}', hint)

    def _expression(self, place: Place, text: str, scope: Scope) -> Expression | None:
        try:
            return compile_expression(text, scope)
        except ExpressionError as error:
            self._problems.add_once(place, error.what, error.help)
            return None


def _skips(code: Code) -> bool:
    """Whether a skipped input skips the item."""
    return any(includes(value.type, Skipped) and p not in code.sees_skipped for p, value in code.takes.items())


def _follows(draft: Draft, each: tuple[Level, ...], before: Mapping[str, Node]) -> str | None:
    """The streaming node whose chunks a node takes one by one, as they come."""
    if len(each) != 1:
        return None
    node = each[0].list.text.strip()
    others = [text for place, text, _ in expressions(draft) if place[1:2] != ("each",)]
    if node not in before or not before[node].streams or any(node in names_in(text) for text in others):
        return None
    return node


def _result(each: tuple[Level, ...], gives: Any) -> Any:
    """The type of a node's result: a list for each loop. A skipped element or list makes its answer skipped too."""
    for level in reversed(each):
        (element,) = typing.get_args(without(level.list.type, Skipped))
        inside = union([gives, Skipped]) if includes(element, Skipped) else gives
        gives = list[inside]  # type: ignore[valid-type]
        gives = union([gives, Skipped]) if includes(level.list.type, Skipped) else gives
    return gives
