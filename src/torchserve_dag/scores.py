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


def score_in(answer: Any, path: str) -> float | None:
    """The number in one answer; nothing where it holds none."""
    for name in path.split("."):
        answer = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
        return None
    return float(answer)


def note(request_id: str | None, score: float | None) -> None:
    """Write it down, where this worker's logs are; an answer never waits for it, nor fails with it."""
    folder = os.environ.get("LOG_LOCATION")
    if folder is None or request_id is None or score is None:
        return
    line = json.dumps({"request_id": request_id, "score": score}) + "\n"
    try:  # opened anew each time: the front door's keeper renames it when it is full
        file = os.open(Path(folder) / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # in one piece, whoever else writes
        finally:
            os.close(file)
    except OSError:
        logger.exception("request %s: its score cannot be written", request_id)
