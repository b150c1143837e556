"""A model's requests, from the front door's logs: the version chosen, the outcome, the scores."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.front_door.bootstrap import FEEDBACK_LOG, REQUESTS_LOG
from torchserve_dag.releases.version_metrics import LEFT
from torchserve_dag.runtime.telemetry.scores import FILE as SCORES_LOG


@dataclass(frozen=True, slots=True)
class LoggedRequest:
    """A request whose version was chosen by weight: it named none, and no rule applied."""

    id: str
    version: str
    """The version chosen first, even if the fallback answered."""
    ms: float
    failed: bool
    """The client got no answer or status 5xx; an answer of the fallback is not a failure."""
    fell_back: bool
    left: bool = False
    """The client disconnected before the answer."""
    score: float | None = None
    """The score that the workflow gave the answer."""
    feedback: float | None = None
    """The last score that a client posted to /feedback."""


def read(logs: Path, model: str, since: dt.datetime | None = None) -> list[LoggedRequest]:
    """A model's requests in the order of the logs, as far back as these are kept."""
    scores = {(line["request_id"], line["model"], line["version"]): line["score"] for line in _lines(logs / SCORES_LOG)}
    feedback = {line["request_id"]: line["score"] for line in _lines(logs / FEEDBACK_LOG)}
    found = (line for line in _lines(logs / REQUESTS_LOG) if _counts(line, model))
    return [
        LoggedRequest(
            line["request_id"],
            line["first"],
            float(line["duration_ms"]),
            _failed(line),
            line["version"] not in {line["first"], None},
            _left(line),
            scores.get((line["request_id"], model, line["version"])),
            feedback.get(line["request_id"]),
        )
        for line in found
        if since is None or dt.datetime.fromisoformat(line["time"].replace("Z", "+00:00")) >= since
    ]


def _counts(line: dict[str, Any], model: str) -> bool:
    return line.get("route") == model and bool(line.get("first")) and not line.get("cancels")


def _left(line: dict[str, Any]) -> bool:
    return not line["status"] and LEFT.issuperset((line["flags"] or "-").split(","))


def _failed(line: dict[str, Any]) -> bool:
    if _left(line):
        return False
    status, in_answer = int(line["status"] or 0), int(line.get("grpc_failure") or 0)
    return max(status, in_answer) >= HTTPStatus.INTERNAL_SERVER_ERROR or status == 0 or line["grpc_status"] in _FAILED


_FAILED = {2, 4, 8, 13, 14, 15}
"""gRPC status codes that correspond to 5xx; 8 is a worker that ran out of memory or was killed."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log and its rotated predecessors; an incomplete line is skipped."""
    older = sorted(path.parent.glob(f"{path.stem}.[0-9].log"), reverse=True)
    for file in [*older, path]:
        try:
            with file.open("rb") as lines:
                for line in lines:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue
        except OSError:
            continue
