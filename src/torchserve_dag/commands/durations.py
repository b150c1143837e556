"""Durations as options give them: 500ms, 60s, 5m, 12h, 30d."""

from __future__ import annotations

import re

from torchserve_dag.commands.common import fail

_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400, "y": 365 * 86_400}


def seconds(text: str, examples: str) -> float:
    """A duration in seconds. For anything else the command ends, with `examples` of what to write."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ms|[smhdwy])", text)
    if not match:
        fail(f'"{text}" is not a time: write {examples}.')
    return float(match[1]) * _SECONDS[match[2]]
