"""The answers of one node's items, in the order of the items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

PENDING: Any = object()
"""Marks an answer that is still to come in a list of answers."""
_PASSED_ON: Any = object()
"""Stands where an answer was in a list of answers, once that was passed on."""


@dataclass
class Gather:
    """Collects a node's answers. Not locked: the engine's lock is held while it is used."""

    answers: list[Any]
    """One answer for a node that runs once; lists in lists for nested loops."""
    pending: int = 0
    """How many answers are still to come."""
    open: bool = False
    """Whether more items may come: the node streams, or follows a node that streams."""
    consumed: int = 0
    """For a node that follows a stream: how many of the stream's chunks have become items."""
    skipped: int = 0
    ended: bool = False
    """Whether the node has ended."""
    passing: bool = False
    """Whether an answer is dropped once it is passed on, because nothing else needs it: see Plan.way."""

    def ready_from(self, first: int) -> list[tuple[int, Any]]:
        """The consecutive answers that are present from index `first` on, each with its index, to be passed on."""
        end = first
        while end < len(self.answers) and self.answers[end] is not PENDING:
            end += 1
        ready = list(enumerate(self.answers[first:end], first))
        if self.passing:  # the caller has the last reference: freeing an image under the lock would take time
            self.answers[first:end] = [_PASSED_ON] * len(ready)
        return ready

    def complete(self) -> bool:
        """Whether all answers are there; true only once, for the first call after the last answer."""
        if self.ended or self.pending or self.open:
            return False
        self.ended = True
        return True
