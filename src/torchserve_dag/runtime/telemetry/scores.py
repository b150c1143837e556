"""The log of scores: a number in each answer that says how good it is (`serve: {score: FIELD}`), for experiments."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.data import plain

logger = logging.getLogger(__name__)

FILE = "scores.log"
"""In TorchServe's log folder: one JSON line for each answer, with the request's id."""
MAX_BYTES = 50 * 2**20
"""A larger file is rotated to `scores.1.log`, which replaces the previous one."""


LIMIT = 1_000_000
"""A score lies between -LIMIT and LIMIT: sums and squares of scores must stay finite."""


def score_in(answer: Any, path: str) -> float | None:
    """The score at a dotted path in an answer; None where there is none."""
    for name in path.split("."):
        answer = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
    return valid(plain.scalar(answer))


def valid(score: Any) -> float | None:
    """The score as a number; None for anything else, and for numbers beyond LIMIT."""
    if isinstance(score, bool) or not isinstance(score, int | float) or not -LIMIT <= score <= LIMIT:
        return None
    return float(score)


def log_score(model: str, version: str, request_id: str | None, score: float | None, token: str | None) -> None:
    """Append a score to the log of this worker's TorchServe. A failure here never fails the answer.

    `token`: whose request it was, for two tokens may choose the same id.
    """
    folder = os.environ.get("LOG_LOCATION")
    if folder is None or request_id is None or score is None:
        return
    fields = {"request_id": request_id, "model": model, "version": version, "score": score, "token": token}
    line = json.dumps(fields) + "\n"
    path = Path(folder) / FILE
    try:  # opened for each score: any worker may rotate the file
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())  # a single write, so that lines of several workers do not mix
            if os.fstat(file).st_size > MAX_BYTES:
                path.replace(path.with_suffix(".1.log"))
        finally:
            os.close(file)
    except OSError as error:
        logs.report(logger, error, f"request {request_id}: the score could not be written")
