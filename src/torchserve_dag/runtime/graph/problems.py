"""The mistakes in a workflow's file, collected so that a person sees all mistakes of a step at once."""

from __future__ import annotations

from typing import Any

from torchserve_dag.runtime.data.source import CheckError, Problem, Source

Place = tuple[str | int, ...]
"""A node's name, and the path from there to a key of its YAML."""


class Problems:
    def __init__(self, source: Source[Any]) -> None:
        self.source = source
        self.found: list[Problem] = []

    def __len__(self) -> int:
        return len(self.found)

    def add(self, place: Place, what: str, help: str = "") -> None:  # noqa: A002 (the word that is printed)
        """Add a mistake in a node."""
        self.found.append(self._problem(place, what, help))

    def add_once(self, place: Place, what: str, help: str) -> None:  # noqa: A002
        """Add a mistake in a node, unless another expression of the node has reported the same."""
        problem = self._problem(place, what, help)
        if problem not in self.found:
            self.found.append(problem)

    def add_at(self, path: Place, what: str, help: str = "") -> None:  # noqa: A002
        """Add a mistake elsewhere in the file."""
        self.found.append(self.source.problem(path, what, help))

    def add_all(self, error: CheckError) -> None:
        """Add the mistakes in another file, each once."""
        self.found += [problem for problem in error.problems if problem not in self.found]

    def _problem(self, place: Place, what: str, help: str) -> Problem:  # noqa: A002
        return self.source.problem(("nodes", *place), f"{place[0]}: {what}", help)

    def stop(self) -> None:
        """Raise CheckError if there are mistakes."""
        if self.found:
            raise CheckError(self.found)
