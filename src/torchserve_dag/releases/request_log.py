"""What the logs say of a model's requests: which version each was given to, what became of it, how good it was."""

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
    """One that named no version and that no rule sent: its version was chosen by weight."""

    id: str
    version: str
    """The one that was chosen, whoever answered in the end."""
    ms: float
    failed: bool
    """The client got no answer, or one with 5xx; a fallback's answer is none of these."""
    fell_back: bool
    left: bool = False
    """The client did not wait for the answer."""
    score: float | None = None
    """What the workflow said of its answer."""
    feedback: float | None = None
    """What a client said of it, the last time."""


def read(logs: Path, model: str, since: dt.datetime | None = None) -> list[LoggedRequest]:
    """A model's requests, in their order, as far back as the logs are kept."""
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
"""gRPC's codes that say what 5xx says; 8 is a worker out of memory, or killed."""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Of a log and its older ones; a line that is not whole yet is left out."""
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
