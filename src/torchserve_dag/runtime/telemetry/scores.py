"""The log of scores: a number in each answer that says how good it is (`serve: {score: FIELD}`), for experiments."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FILE = "scores.log"
"""In TorchServe's log folder: one JSON line for each answer, with the request's id."""
MAX_BYTES = 50 * 2**20
"""A larger file is rotated to `scores.1.log`, which replaces the previous one."""


def score_in(answer: Any, path: str) -> float | None:
    """The number at a dotted path in an answer; None where there is no finite number."""
    for name in path.split("."):
        answer = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        return None
    return float(answer)


def log_score(model: str, version: str, request_id: str | None, score: float | None) -> None:
    """Append a score to the log of this worker's TorchServe. A failure here never fails the answer."""
    folder = os.environ.get("LOG_LOCATION")
    if folder is None or request_id is None or score is None:
        return
    line = json.dumps({"request_id": request_id, "model": model, "version": version, "score": score}) + "\n"
    path = Path(folder) / FILE
    try:  # opened for each score: any worker may rotate the file
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # a single write, so that lines of several workers do not mix
            if os.fstat(file).st_size > MAX_BYTES:
                path.replace(path.with_suffix(".1.log"))
        finally:
            os.close(file)
    except OSError:
        logger.exception("request %s: the score could not be written", request_id)
