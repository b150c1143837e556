"""The files of rollouts: their progress, which the keeper writes and commands show, and commands, which it obeys."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchserve_dag.archives import atomic
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

WHOLE = 100.0

Stage = Literal["waiting", "loading", "rolling", "done", "back"]
Command = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """The options of the `rollout` command."""

    model: str
    version: str
    steps: tuple[float, ...]
    """The new version's share at each step, in percent; the last is 100."""
    every_s: float
    stop_if: str
    at_least: int
    """Requests that the new version must have had before the next step."""
    patience_s: float
    """Seconds after which a step that has had too few requests is rolled back."""
    ready_s: float
    """How long the new version may take to load."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """A version's metrics within the current step."""

    requests: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, found: VersionMetrics) -> StepMetrics:
        return cls(found.requests, found.errors, found.percentile(0.5), found.percentile(0.99))


@dataclass(frozen=True, slots=True)
class RolloutProgress:
    """The state of a rollout."""

    plan: RolloutPlan
    stage: Stage = "waiting"
    share: float = 0.0
    """The new version's share of the requests, in percent."""
    before: dict[str, float] = field(default_factory=dict)
    """The weights before the rollout; rolling back restores them."""
    reason: str = ""
    """Why the rollout ended."""
    new: StepMetrics | None = None
    old: StepMetrics | None = None
    began: float = 0.0
    """In seconds since 1970."""
    ended: float = 0.0

    @property
    def over(self) -> bool:
        return self.stage in {"done", "back"}


class RolloutStore:
    """Files with the progress of rollouts, for commands, and with pending commands, for the keeper."""

    def __init__(self, state: State) -> None:
        self.folder = state.front_door / "rollouts"

    def request(self, plan: RolloutPlan) -> None:
        """Request a rollout; the keeper starts it. Raises ServerError while another of the model is running."""
        found = self.progress(plan.model)
        if found and not found.over:
            raise ServerError(
                f"{plan.model} is being rolled out to {found.plan.version} already: promote it or roll it back first."
            )
        self.command(plan.model, None)
        self.save(RolloutProgress(plan, began=time.time()))

    def command(self, model: str, order: Command | None) -> None:
        path = self.folder / f"{model}.order"
        atomic.write_private(path, order) if order else path.unlink(missing_ok=True)

    def pending_command(self, model: str) -> Command | None:
        try:
            text = (self.folder / f"{model}.order").read_text("utf-8")
        except OSError:
            return None
        return "promote" if text == "promote" else "rollback"

    def save(self, progress: RolloutProgress) -> None:
        atomic.write_private(self.folder / f"{progress.plan.model}.json", json.dumps(plain.flatten(progress), indent=2))

    def progress(self, model: str) -> RolloutProgress | None:
        """The progress of a model's last rollout."""
        return _read(self.folder / f"{model}.json")

    def all(self) -> list[RolloutProgress]:
        found = (_read(path) for path in sorted(self.folder.glob("*.json")))
        return [one for one in found if one]

    def forget_running(self) -> None:
        """End, at start-up, the rollouts that were running when the server was stopped."""
        for one in self.all():
            if not one.over:
                self.save(replace(one, stage="back", share=0.0, reason="the server was stopped", ended=time.time()))


def _read(path: Path) -> RolloutProgress | None:
    try:
        return plain.build(RolloutProgress, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, plain.WrongDataError):
        return None
