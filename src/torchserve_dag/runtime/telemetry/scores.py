"""A number in each answer that says how good it is (`serve: {score: FIELD}`), kept beside the logs for experiments."""

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
"""In the folder of TorchServe's logs: a line of JSON for each answer, with the request's id."""
MAX_BYTES = 50 * 2**20
"""Then it becomes `scores.1.log`, and the one before is gone."""


def score_in(answer: Any, path: str) -> float | None:
    """The number in one answer; nothing where it holds none."""
    for name in path.split("."):
        answer = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        return None
    return float(answer)


def note(model: str, version: str, request_id: str | None, score: float | None) -> None:
    """Write it down, where this worker's logs are; an answer never fails with it."""
    folder = os.environ.get("LOG_LOCATION")
    if folder is None or request_id is None or score is None:
        return
    line = json.dumps({"request_id": request_id, "model": model, "version": version, "score": score}) + "\n"
    path = Path(folder) / FILE
    try:  # opened anew each time: any worker may find that it is full
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # in one piece, whoever else writes
            if os.fstat(file).st_size > MAX_BYTES:
                path.replace(path.with_suffix(".1.log"))
        finally:
            os.close(file)
    except OSError:
        logger.exception("request %s: its score cannot be written", request_id)
