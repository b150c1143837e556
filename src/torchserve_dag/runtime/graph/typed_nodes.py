"""The third step of a check: each node with its expressions compiled and the type of its result."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import Any

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.dependencies import expressions
from torchserve_dag.runtime.graph.drafts import Draft, DraftCode
from torchserve_dag.runtime.graph.expression import Expression, ExpressionError, compile_expression, names_in
from torchserve_dag.runtime.graph.graph import PARAMETERS, REQUEST, Branch, Code, Level, Node, Repeat
from torchserve_dag.runtime.graph.policies import attempts_of, policy_of
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.types import fits, includes, union, without
from torchserve_dag.runtime.graph.upstream import upstream
from torchserve_dag.runtime.messages import Skipped
from torchserve_dag.runtime.project.workflow_file import FallbackFile

Scope = Mapping[str, Any]
"""The type of each name that an expression may read."""


class NodeTyper:
    """Makes nodes from drafts. Mistakes are added to `problems`."""

    def __init__(self, drafts: Mapping[str, Draft], problems: Problems) -> None:
        self._drafts = drafts
        self._stopped = {target for draft in drafts.values() for target in draft.file.stops}
        """The nodes that another may end early."""
        self._problems = problems

    def request_type(self) -> Any:
        """The type of the request, on which all nodes that read the whole request must agree."""
        wants = [
            (name, without(code.signature.takes[parameter], Skipped))
            for name, draft in self._drafts.items()
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

    def node(self, name: str, scope: Scope, before: Mapping[str, Node]) -> Node | None:
        """The typed node; None if there are problems, which are added. `before`: the nodes that it may read."""
        draft = self._drafts[name]
        loops = self._levels(draft, scope)
        if loops is None:
            return None
        each, inside = loops
        file = draft.file
        when = self._condition((name, "when"), file.when, inside)
        branches = tuple(
            Branch(self._condition((*code.place, "when"), code.when, inside), self._code(code, draft, inside, before))
            for code in draft.branches
        )
        fallbacks = tuple(self._code(code, draft, inside, before) for code in draft.fallbacks)
        follows = _follows(draft, each, before)
        if len(self._problems):
            return None
        codes = [branch.code for branch in branches]
        gives = union([code.gives for code in (*codes, *fallbacks)])
        policy = policy_of(name, file, gives, fallbacks, self._problems)
        repeat, stops = self._repeat(draft, codes, gives), self._stops(draft, gives, before)
        if len(self._problems):
            return None
        may_skip = when is not None or branches[-1].when is not None or any(map(_skips, codes))
        if draft.yields:
            result: Any = list[gives]  # type: ignore[valid-type]
            result = union([result, Skipped]) if may_skip else result
        else:
            may_skip = may_skip or policy.on_error == "skip" or (name in self._stopped and follows is None)
            result = _result(each, union([gives, Skipped]) if may_skip else gives)
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
            repeat=repeat,
            stops=stops,
        )

    def _repeat(self, draft: Draft, codes: Sequence[Code], gives: Any) -> Repeat | None:
        file = draft.file.repeat
        if file is None:
            return None
        for code, drafted in zip(codes, draft.branches, strict=True):
            for parameter in drafted.inputs:
                want = drafted.signature.takes[parameter]
                if not fits(without(code.gives, Skipped), want):
                    called, have = drafted.signature.called, plain.name_of(code.gives)
                    what = f"{called} takes {plain.name_of(want)} and gives {have}, which cannot be its next input"
                    self._problems.add((draft.name, "repeat"), what, "let it give what it takes")
        until = self._on_answer((draft.name, "repeat", "until"), file.until, draft.name, gives)
        return Repeat(until, file.most) if until else None

    def _stops(self, draft: Draft, gives: Any, before: Mapping[str, Node]) -> Mapping[str, Expression]:
        stops = {}
        for target, text in draft.file.stops.items():
            place = (draft.name, "stops", target)
            if target in _ended_before(draft.needs, _as_they_come(draft, before), before):
                what = f"{target} has ended before {draft.name} begins, so it cannot be ended early"
                self._problems.add(place, what, "write a when for the nodes that read it")
            elif condition := self._on_answer(place, text, draft.name, gives):
                stops[target] = condition
        return stops

    def _on_answer(self, place: Place, text: str, name: str, gives: Any) -> Expression | None:
        """A condition on an answer of a node, under the node's name."""
        try:
            names = names_in(text)
        except ExpressionError as error:
            self._problems.add(place, error.what, error.help)
            return None
        if others := sorted(names - {name, PARAMETERS}):
            what = f'"{text}" reads {others[0]}, and here is only {name}, for its own answer, and {PARAMETERS}'
            self._problems.add(place, what)
            return None
        return self._condition(place, text, {name: without(gives, Skipped), PARAMETERS: dict[str, str]})

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

    def _code(self, code: DraftCode, draft: Draft, scope: Scope, before: Mapping[str, Node]) -> Code:
        signature = code.signature
        feeds = {p: code.inputs[p].strip() for p in signature.feeds if p in code.inputs}
        for parameter, source in feeds.items():
            if source in before and not before[source].streams:
                what = f"{signature.called} takes chunks as they come, and {source} gives none"
                self._problems.add(draft.input_place(parameter), what, "take its result, without AsyncIterator")
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
            attempts=attempts_of(code.file if isinstance(code.file, FallbackFile) else draft.file),
            feeds=feeds,
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
    seen = code.sees_skipped | code.feeds.keys()  # a stream that is skipped is an empty one
    return any(includes(value.type, Skipped) and p not in seen for p, value in code.takes.items())


def _as_they_come(draft: Draft, before: Mapping[str, Node]) -> frozenset[str]:
    """The nodes whose chunks a node gets before they have ended, one by one or by a function that takes them."""
    feeds = {code.inputs[p].strip() for code in draft.all for p in code.signature.feeds if p in code.inputs}
    lists = {text.strip() for text in draft.file.levels.values()}
    return frozenset(feeds | {name for name in lists if name in before and before[name].streams})


def _ended_before(needs: frozenset[str], as_they_come: frozenset[str], nodes: Mapping[str, Node]) -> set[str]:
    """The nodes that have ended before one that reads `needs` has its first answer."""
    ended = upstream(needs - as_they_come, {name: node.needs for name, node in nodes.items()})
    for name in as_they_come & nodes.keys():
        node = nodes[name]
        ended |= _ended_before(node.needs, node.needs - node.waits_for, nodes)
    return ended


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
