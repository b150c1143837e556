"""The first step of a check: the code that each node of a workflow's file may run, with its expressions as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.finder import Finder
from torchserve_dag.runtime.graph.graph import REQUEST
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.graph.signature import Signature
from torchserve_dag.runtime.project.workflow_file import (
    CodeFile,
    FallbackFile,
    NodeFile,
    OtherwiseFile,
    WorkflowFile,
)


@dataclass
class DraftCode:
    """Code that a node may run: its place in the file, and the expression for each of its parameters."""

    place: Place
    name: str
    file: CodeFile
    when: str | None
    """The branch's condition, as text."""
    signature: Signature
    inputs: dict[str, str] = field(default_factory=dict)
    """Each parameter's expression, as text."""


@dataclass
class Draft:
    """A node whose code is known, and whose expressions are still text."""

    name: str
    file: NodeFile
    branches: list[DraftCode]
    fallbacks: list[DraftCode] = field(default_factory=list)
    needs: frozenset[str] = frozenset()
    """The names that its expressions read: nodes, and the request."""

    @property
    def all(self) -> list[DraftCode]:
        return [*self.branches, *self.fallbacks]

    @property
    def yields(self) -> bool:
        return self.branches[0].signature.yields

    def level_place(self, level: str) -> Place:
        """The place in the file of a loop's list."""
        return (self.name, "each", level) if isinstance(self.file.each, dict) else (self.name, "each")

    def input_place(self, parameter: str) -> Place:
        """The place in the file of a parameter's value."""
        return (self.name, "inputs", parameter) if self.file.inputs else (self.name, "input")


class DraftReader:
    """Reads the nodes of one workflow's file. Mistakes are added to `problems`."""

    def __init__(self, file: WorkflowFile, finder: Finder, problems: Problems) -> None:
        self._file = file
        self._finder = finder
        self._problems = problems

    def read(self) -> dict[str, Draft]:
        """The nodes whose code has no problems."""
        return {name: draft for name, node in self._file.nodes.items() if (draft := self._draft(name, node))}

    def _draft(self, name: str, node: NodeFile) -> Draft | None:
        for level in node.levels:
            if level in self._file.nodes:
                self._problems.add(
                    (name, "each", level), f'"{level}" is a node already', "give the element another name"
                )
        if node.switch is None:
            branches = [self._code((name,), name, node, node, None)]
        else:
            branches = [
                self._code((name, "switch", i), f"{name}.{_branch_name(branch, i)}", branch, node, branch.when)
                for i, branch in enumerate(node.switch)
            ]
            taken = [*(branch.name for branch in branches if branch), *_fallback_names(name, node)]
            if len(set(taken)) < len(taken):  # the engine and the metrics know a branch by its name
                for i, branch in enumerate(branches):
                    if branch:
                        branch.name = f"{branch.name}_{i + 1}"
        draft = Draft(name, node, [branch for branch in branches if branch])
        for i, (called, file) in enumerate(zip(_fallback_names(name, node), _fallbacks(node), strict=True)):
            place: Place = (name, "on_error", "fallback")
            in_list = isinstance(node.on_error, OtherwiseFile) and isinstance(node.on_error.fallback, list)
            if code := self._code((*place, i) if in_list else place, called, file, node, None):
                draft.fallbacks.append(code)
        if None in branches or not branches:
            return None
        self._check_yields(draft)
        self._check_repeat(draft)
        self._check_stops(draft)
        self._check_feeds(draft)
        return draft

    def _code(self, place: Place, name: str, file: CodeFile, node: NodeFile, when: str | None) -> DraftCode | None:
        signature = self._finder.find(place, file)
        if signature is None:
            return None
        code = DraftCode(place, name, file, when, signature)
        code.inputs = self._inputs(code, node)
        return code

    def _inputs(self, code: DraftCode, node: NodeFile) -> dict[str, str]:
        signature, name = code.signature, str(code.place[0])
        called, takes = signature.called, signature.takes
        if node.inputs:
            if not signature.kind.by_name:
                self._problems.add((name, "inputs"), f"{called} takes one input", "write input")
                return {}
            for unknown in node.inputs.keys() - takes.keys():
                hint = plain.did_you_mean(unknown, list(takes))
                self._problems.add((name, "inputs", unknown), f'{called} has no parameter "{unknown}"', hint)
            for missing in takes.keys() - node.inputs.keys() - signature.optional:
                self._problems.add((name, "inputs"), f'the parameter "{missing}" of {called} gets nothing')
            return {p: text for p, text in node.inputs.items() if p in takes}
        wanted = [p for p in takes if p not in signature.optional] or list(takes)[:1]
        if len(wanted) != 1:
            if takes:
                self._problems.add(code.place, f"{called} takes {', '.join(takes)}", "say what each gets, under inputs")
            else:
                self._problems.add((*code.place, "function"), f"{called} takes nothing", "give it a parameter")
            return {}
        return {wanted[0]: node.input or (list(node.levels)[-1] if node.levels else REQUEST)}

    def _check_yields(self, draft: Draft) -> None:
        for code in draft.all:
            if not code.signature.yields and getattr(code.file, "first_chunk_s", None) is not None:
                what = f"{code.signature.called} gives no chunks"
                self._problems.add((*code.place, "first_chunk_s"), what, "write timeout_s")
        yielding = [code for code in draft.all if code.signature.yields]
        if not yielding:
            return
        called, name = yielding[0].signature.called, draft.name
        if len(draft.branches) > 1:
            what = f"{called} yields, so it cannot be one of several"
            self._problems.add((name,), what, "give it a node of its own")
        if not draft.yields:
            what = f"{called} yields, and what it stands in for does not"
            self._problems.add(yielding[0].place, what, "let it return one answer")
        if draft.file.levels:
            what = f"{called} yields, so it runs once for a request, not for each item"
            self._problems.add((name, "each"), what, "let a function after it take its chunks, with each")
        if draft.yields and draft.file.on_error != "fail" and not draft.fallbacks:
            what = f"{called} yields, so a fallback may stand in for it before its first chunk, and nothing else"
            self._problems.add((name, "on_error"), what, "write a fallback")

    def _check_repeat(self, draft: Draft) -> None:
        if draft.file.repeat is None:
            return
        place = (draft.name, "repeat")
        for code in draft.branches:
            called = code.signature.called
            if code.signature.yields:
                what = f"{called} yields, and only a single answer can be the input of a next round"
                self._problems.add_once(place, what, "gather its chunks in a workflow, and repeat that")
            elif len(code.inputs) > 1:
                what = f"{called} has several inputs, and its answer could be only one of them"
                self._problems.add_once(place, what, "let it take, and give, one message that holds them all")

    def _check_stops(self, draft: Draft) -> None:
        others = [name for name in self._file.nodes if name != draft.name]
        for target in draft.file.stops:
            if target not in others:
                hint = plain.did_you_mean(target, others)
                self._problems.add((draft.name, "stops", target), f'there is no other node "{target}"', hint)

    def _check_feeds(self, draft: Draft) -> None:
        for code in draft.all:
            for parameter in code.signature.feeds:
                text = code.inputs.get(parameter, "").strip()
                if text and text not in self._file.nodes:
                    what = f'{code.signature.called} takes chunks as they come, and "{text}" is no node that gives any'
                    self._problems.add(draft.input_place(parameter), what, "name a node")


def _fallbacks(node: NodeFile) -> list[FallbackFile]:
    return node.on_error.fallbacks if isinstance(node.on_error, OtherwiseFile) else []


def _fallback_names(name: str, node: NodeFile) -> list[str]:
    several = _fallbacks(node)
    return (
        [f"{name}.fallback_{i}" for i in range(1, len(several) + 1)]
        if len(several) > 1
        else [f"{name}.fallback"] * len(several)
    )


def _branch_name(branch: CodeFile, index: int) -> str:
    served = branch.served.model if branch.served else None
    archive = Path(branch.torchserve.archive).stem if branch.torchserve else None
    text = branch.handler or branch.function or branch.workflow or served or archive or str(index)
    return text.replace("/", "_").replace(".", "_")
