"""The answers of one node's items, in the order of the items."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

PENDING: Any = object()
"""Marks an answer that is still to come in a list of answers."""


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

    def ready_from(self, first: int) -> list[tuple[int, Any]]:
        """The consecutive answers that are present from index `first` on, each with its index."""
        ready = itertools.takewhile(lambda answer: answer is not PENDING, itertools.islice(self.answers, first, None))
        return list(enumerate(ready, first))

    def complete(self) -> bool:
        """Whether all answers are there; true only once, for the first call after the last answer."""
        if self.ended or self.pending or self.open:
            return False
        self.ended = True
        return True
