"""A model's requests, from the front door's logs: the version chosen, the outcome, the scores."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from torchserve_dag.front_door.access_logs import FEEDBACK_LOG, REQUESTS_LOG
from torchserve_dag.releases.version_metrics import gave_up
from torchserve_dag.runtime.telemetry.scores import FILE as SCORES_LOG
from torchserve_dag.runtime.telemetry.scores import valid


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
    """The client gave up: it disconnected, or the deadline that it had chosen passed."""
    refused: bool = False
    """The client's mistake (4xx), which says nothing about the version."""
    score: float | None = None
    """The score that the workflow gave the answer."""
    feedback: float | None = None
    """The last score that the request's own token posted to /feedback."""


def read(logs: Path, model: str, since: dt.datetime | None = None) -> list[LoggedRequest]:
    """A model's requests in the order of the logs, as far back as these are kept."""
    scores = {(*_whose(line), line.get("model"), line.get("version")): line for line in _lines(logs / SCORES_LOG)}
    feedback = {_whose(line): line for line in _lines(logs / FEEDBACK_LOG)}
    found = (line for line in _lines(logs / REQUESTS_LOG) if _counts(line, model))
    return [
        LoggedRequest(
            line["request_id"],
            line["first"],
            float(line["duration_ms"]),
            _failed(line),
            line["version"] not in {line["first"], None},
            _left(line),
            _refused(line),
            valid(scores.get((*_whose(line), model, line["version"]), {}).get("score")),
            valid(feedback.get(_whose(line), {}).get("score")),
        )
        for line in found
        if since is None or dt.datetime.fromisoformat(line["time"].replace("Z", "+00:00")) >= since
    ]


def _counts(line: dict[str, Any], model: str) -> bool:
    return line.get("route") == model and bool(line.get("first")) and not line.get("cancels")


def _whose(line: dict[str, Any]) -> tuple[Any, Any]:
    """A request's id and its token: another token may have chosen the same id."""
    return line.get("request_id"), line.get("token")


def _status(line: dict[str, Any]) -> int:
    """The status of the answer; over gRPC, where it has another one, that of the failure in it."""
    return int(line.get("grpc_failure") or 0) or int(line["status"] or 0)


def _left(line: dict[str, Any]) -> bool:
    return gave_up(_status(line), line["flags"] or "-")


def _refused(line: dict[str, Any]) -> bool:
    return not _left(line) and HTTPStatus.BAD_REQUEST <= _status(line) < HTTPStatus.INTERNAL_SERVER_ERROR


def _failed(line: dict[str, Any]) -> bool:
    if _left(line) or _refused(line):
        return False
    status = _status(line)
    return status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == 0 or line["grpc_status"] in _FAILED


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
                        fields = json.loads(line)
                    except ValueError:
                        continue
                    if isinstance(fields, dict):
                        yield fields
        except OSError:
            continue
