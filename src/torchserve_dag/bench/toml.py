"""Reads TOML: Python's own parser exists only from 3.11 on."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(text: str) -> dict[str, Any]:
    """Raises ValueError, which names the line."""
    data: dict[str, Any] = tomllib.loads(text)
    return data
