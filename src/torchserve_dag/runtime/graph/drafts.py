"""The first step of a check: the code that each node of a workflow's file may run, with its expressions as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.graph.finder import Finder, Signature
from torchserve_dag.runtime.graph.graph import REQUEST
from torchserve_dag.runtime.graph.problems import Place, Problems
from torchserve_dag.runtime.project.workflow_file import CodeFile, NodeFile, OtherwiseFile, WorkflowFile


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
    fallback: DraftCode | None = None
    needs: frozenset[str] = frozenset()
    """The names that its expressions read: nodes, and the request."""

    @property
    def all(self) -> list[DraftCode]:
        return [*self.branches, self.fallback] if self.fallback else self.branches

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
            taken = [*(branch.name for branch in branches if branch), f"{name}.fallback"]
            if len(set(taken)) < len(taken):  # the engine and the metrics know a branch by its name
                for i, branch in enumerate(branches):
                    if branch:
                        branch.name = f"{branch.name}_{i + 1}"
        draft = Draft(name, node, [branch for branch in branches if branch])
        if isinstance(node.on_error, OtherwiseFile) and node.on_error.fallback:
            place = (name, "on_error", "fallback")
            draft.fallback = self._code(place, f"{name}.fallback", node.on_error.fallback, node, None)
        if None in branches or not branches:
            return None
        self._check_yields(draft)
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
        yielding = [code for code in draft.all if code.signature.yields]
        if not yielding:
            return
        called, name = yielding[0].signature.called, draft.name
        if len(draft.branches) > 1:
            what = f"{called} yields, so it cannot be one of several"
            self._problems.add((name,), what, "give it a node of its own")
        if not draft.yields:
            place, what = (name, "on_error", "fallback"), f"{called} yields, and what it stands in for does not"
            self._problems.add(place, what, "let it return one answer")
        if draft.file.levels:
            what = f"{called} yields, so it runs once for a request, not for each item"
            self._problems.add((name, "each"), what, "let a function after it take its chunks, with each")
        if draft.yields and draft.file.on_error != "fail" and not draft.fallback:
            what = f"{called} yields, so a fallback may stand in for it before its first chunk, and nothing else"
            self._problems.add((name, "on_error"), what, "write a fallback")


def _branch_name(branch: CodeFile, index: int) -> str:
    served = branch.served.model if branch.served else None
    archive = Path(branch.torchserve.archive).stem if branch.torchserve else None
    text = branch.handler or branch.function or branch.workflow or served or archive or str(index)
    return text.replace("/", "_").replace(".", "_")
