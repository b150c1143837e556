"""Write settings into a handler's YAML; all other lines and comments stay as they are."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchserve_dag.archives import atomic
from torchserve_dag.runtime.data.source import CheckError, Problem


def check_writable(path: Path, section: str = "run") -> None:
    """Raises CheckError if `write_settings` could not write the file, before anything is measured."""
    _start(path, path.read_text("utf-8").splitlines(), section)
    if not (os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)):
        what = f"the file, or its folder {path.parent}, may not be written"
        raise CheckError([Problem(str(path), 1, what, "allow it, or use --dry-run")])


def _start(path: Path, lines: list[str], section: str) -> int | None:
    """The line of the section, if the file has it."""
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{section}:")), None)
    if start is not None and lines[start].partition("#")[0].strip() != f"{section}:":
        help_ = "write its keys on lines of their own"
        raise CheckError(
            [Problem(str(path), start + 1, f"{section}: is written in braces, and tune edits lines", help_)]
        )
    return start


def write_settings(path: Path, settings: Mapping[str, Any], why: str, section: str = "run") -> list[str]:
    """Set these keys below `run:`, or another section; each line of the file that changes ends with the comment `why`.

    Returns the changed lines. Raises CheckError if the section is written in braces.
    """
    lines = path.read_text("utf-8").splitlines()
    start = _start(path, lines, section)
    if start is None:
        lines.append(f"{section}:")
        start = len(lines) - 1
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith((" ", "#"))):
        end += 1
    changed = []
    for key, value in settings.items():
        written = str(value).lower() if isinstance(value, bool) else value
        line = f"{f'  {key}: {written}':<24} # {why}"
        at = next((i for i in range(start + 1, end) if re.match(rf"  {key}:", lines[i])), None)
        if at is None:
            lines.insert(start + 1, line)
            end += 1
        else:
            lines[at] = line
        changed.append(line)
    atomic.write_text(path, "\n".join(lines) + "\n")
    return changed
