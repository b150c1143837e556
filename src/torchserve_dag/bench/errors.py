"""Why a benchmark cannot go on."""

from __future__ import annotations


class BenchError(Exception):
    """One sentence for a person: what is wrong, where, and what to do."""
