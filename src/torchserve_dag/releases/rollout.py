"""A rollout: a new version gets more and more of a model's requests, and none again where it is worse.

The front door's keeper runs it (`run`), and writes how far it is into a file; commands write what is wanted into
others (`RolloutStore`). So it goes on when the terminal is closed, and a server that stops forgets it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torchserve_dag.archives import atomic
from torchserve_dag.clients import ServingError
from torchserve_dag.front_door.door import Door, Traffic, set_rollout
from torchserve_dag.front_door.splits import RolloutShare
from torchserve_dag.releases import route_weights, stop_if, version_metrics, versions
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.connect import torchserve_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

LOOK_S = 0.5
AWAY_S = 30.0
"""How long Envoy may be away in a rollout: it is started again within seconds."""
BACK_S = 600.0
"""How long going back is tried."""
WHOLE = 100.0

Stage = Literal["waiting", "loading", "rolling", "done", "back"]
Command = Literal["promote", "rollback"]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """What was asked for."""

    model: str
    version: str
    steps: tuple[float, ...]
    """The new version's share at each step, in percent; the last is 100."""
    every_s: float
    stop_if: str
    at_least: int
    """Requests of the new version that a step needs before the next."""
    patience_s: float
    """How long a step may wait for them."""
    ready_s: float
    """How long the new version may take to load."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What a version did in this step."""

    requests: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None

    @classmethod
    def of(cls, found: VersionMetrics) -> StepMetrics:
        return cls(found.requests, found.errors, found.percentile(0.5), found.percentile(0.99))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a rollout is."""

    plan: RolloutPlan
    stage: Stage = "waiting"
    share: float = 0.0
    """Of the requests, in percent, that the new version gets."""
    before: dict[str, float] = field(default_factory=dict)
    """The weights that it began with; `rollback` goes back to them."""
    reason: str = ""
    """Why it ended as it did."""
    new: StepMetrics | None = None
    old: StepMetrics | None = None
    brought: bool = False
    """It was not served before."""
    began: float = 0.0
    """In seconds since 1970."""
    ended: float = 0.0

    @property
    def over(self) -> bool:
        return self.stage in {"done", "back"}


class RolloutStore:
    """The files through which commands and the keeper speak of rollouts."""

    def __init__(self, state: State) -> None:
        self.folder = state.front_door / "rollouts"

    def request(self, plan: RolloutPlan) -> None:
        """Have a rollout begun. Raises ServerError where one of the model is under way."""
        found = self.progress(plan.model)
        if found and not found.over:
            raise ServerError(
                f"{plan.model} is being rolled out to {found.plan.version} already: promote it or roll it back first."
            )
        self.command(plan.model, None)
        self.save(Progress(plan, began=time.time()))

    def command(self, model: str, order: Command | None) -> None:
        path = self.folder / f"{model}.order"
        atomic.write_private(path, order) if order else path.unlink(missing_ok=True)

    def pending_command(self, model: str) -> Command | None:
        try:
            text = (self.folder / f"{model}.order").read_text("utf-8")
        except OSError:
            return None
        return "promote" if text == "promote" else "rollback"

    def save(self, progress: Progress) -> None:
        atomic.write_private(self.folder / f"{progress.plan.model}.json", json.dumps(plain.flatten(progress), indent=2))

    def progress(self, model: str) -> Progress | None:
        """Of a model's last rollout."""
        return _read(self.folder / f"{model}.json")

    def all(self) -> list[Progress]:
        found = (_read(path) for path in sorted(self.folder.glob("*.json")))
        return [one for one in found if one]

    def forget_running(self) -> None:
        """At a start: what was under way when the server stopped is over."""
        for one in self.all():
            if not one.over:
                self.save(replace(one, stage="back", share=0.0, reason="the server was stopped", ended=time.time()))


class Rollouts:
    """Runs what is asked for, each in a thread of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = RolloutStore(State(root))
        self._under_way: dict[str, threading.Thread] = {}

    def look(self) -> None:
        """Begin what was asked for since the last look."""
        for one in self.store.all():
            running = self._under_way.get(one.plan.model)
            if one.stage == "waiting" and not (running and running.is_alive()):
                thread = threading.Thread(target=run, args=(self.root, one), name="rollout", daemon=True)
                self._under_way[one.plan.model] = thread
                thread.start()


def run(root: Path, asked: Progress) -> None:
    """One rollout, from the archive to the last step, or back."""
    state = State(root)
    store = RolloutStore(state)
    now = asked
    try:
        now = _load(root, state, store, asked)
        for share in asked.plan.steps:
            now = _step(Door(state), store, replace(now, share=share))
        settle(root, asked.plan.model, {asked.plan.version: WHOLE})
        reason = now.reason or "every step went well"
        store.save(replace(now, stage="done", share=WHOLE, reason=reason, ended=time.time()))
    except _RollBackError as why:
        _back(state, store, asked.plan, str(why))
    except Exception as error:
        logger.exception("rollout of %s", asked.plan.model)
        _back(state, store, asked.plan, str(error))


def settle(root: Path, model: str, weights: Mapping[str, float]) -> None:
    """Let these weights stay, at later starts too: in `routes.yaml` where that knows the model; and the largest is the
    default. Raises ServerError.
    """
    state = State(root)
    door = Door(state)
    weights = {version: weight for version, weight in weights.items() if weight}
    if not weights:
        raise ServerError(f"No version of {model} would get a request.")
    version = max(weights, key=lambda one: weights[one])

    def change(now: Traffic) -> Traffic:
        over = set_rollout(model, None)(now)
        routes = now.routes
        if model in routes:
            routes = {**routes, model: replace(routes[model], versions=weights)}
        return replace(over, routes=routes, defaults={**now.defaults, model: version})

    in_file = model in door.traffic().routes
    if in_file:
        route_weights.check(root, model)
    door.change(change)
    if in_file:
        route_weights.write(root, model, weights)
    with torchserve_client(state) as client:
        client.set_default(model, version)
    state.save_default(model, version)
    for one in weights:  # an earlier rollout of it may have gone back
        state.save_retired(model, one, retired=False)


class _RollBackError(Exception):
    """Why a rollout goes back: one sentence."""


def _load(root: Path, state: State, store: RolloutStore, asked: Progress) -> Progress:
    plan, door = asked.plan, Door(state)
    traffic = door.traffic()
    split = traffic.split(plan.model)
    if split is None:
        raise _RollBackError(f"{plan.model} is not served")
    before = {version: share * WHOLE for version, share in split.shares.items() if share}
    if before.keys() == {plan.version}:
        raise _RollBackError(f"{plan.version} answers all requests already")
    if plan.model in traffic.routes:
        route_weights.check(root, plan.model)
    else:  # a start in the middle of it must not take the highest version, which is the new one
        state.save_default(plan.model, traffic.defaults[plan.model])
    now = replace(asked, stage="loading", before=before)
    store.save(now)
    if not _is_served(traffic, plan):
        try:
            with torchserve_client(state) as client:
                versions.load(state, client, plan.model, plan.version, plan.ready_s, lambda: _obey(store, plan))
        except (ServerError, ServingError) as error:
            raise _RollBackError(f"{plan.version} did not come to serve: {error}") from None
        now = replace(now, brought=True)
        store.save(now)
    return replace(now, stage="rolling")


def _obey(store: RolloutStore, plan: RolloutPlan) -> Command | None:
    """What somebody has ordered. Raises _RollBackError where that is to go back."""
    order = store.pending_command(plan.model)
    if order == "rollback":
        raise _RollBackError("it was rolled back by hand")
    return order


def _is_served(traffic: Traffic, plan: RolloutPlan) -> bool:
    return any((one.model, one.version) == (plan.model, plan.version) for one in traffic.served)


def _step(door: Door, store: RolloutStore, now: Progress) -> Progress:
    """One share, for its time and its requests. Raises _RollBackError where the new version is worse."""
    plan = now.plan
    if now.reason:  # it was promoted: the rest is left out
        return replace(now, share=WHOLE)
    door.change(set_rollout(plan.model, RolloutShare(plan.version, now.share / WHOLE)))
    others = {version: share for version, share in now.before.items() if version != plan.version}
    terms, old_version = stop_if.read(plan.stop_if), max(others, key=lambda one: others[one])
    begin, since = _look(door), time.monotonic()
    while True:
        time.sleep(LOOK_S)
        found, took = _look(door), time.monotonic() - since
        new = _of(found, plan.model, plan.version).since(_of(begin, plan.model, plan.version))
        old = _of(found, plan.model, old_version).since(_of(begin, plan.model, old_version))
        if not old.requests:  # at 100 percent: what it was before
            old = _of(begin, plan.model, old_version)
        shown = replace(now, new=StepMetrics.of(new), old=StepMetrics.of(old))
        store.save(shown)
        if _obey(store, plan) == "promote":
            return replace(shown, share=WHOLE, reason="it was promoted by hand")
        why = stop_if.reason(terms, new, old)
        if why:
            raise _RollBackError(why)
        if took >= plan.every_s and new.requests >= plan.at_least:
            return shown
        if took >= max(plan.every_s, plan.patience_s):
            raise _RollBackError(f"only {new.requests} of the {plan.at_least} requests of a step came in {took:.0f} s")


def _look(door: Door) -> Mapping[version_metrics.ModelVersion, VersionMetrics]:
    """The front door's numbers; it may be started again just now."""
    deadline = time.monotonic() + AWAY_S
    while True:
        try:
            return version_metrics.read(door.admin)
        except ServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(LOOK_S)


def _of(found: Mapping[version_metrics.ModelVersion, VersionMetrics], model: str, version: str) -> VersionMetrics:
    return found.get((model, version), VersionMetrics())


def _back(state: State, store: RolloutStore, plan: RolloutPlan, reason: str) -> None:
    """All requests to who had them before; and a later start leaves a version out that this rollout brought."""
    last = store.progress(plan.model)
    if last and last.brought:
        state.save_retired(plan.model, plan.version)
    door, deadline = Door(state), time.monotonic() + BACK_S
    while True:
        try:
            door.change(set_rollout(plan.model, None))
            break
        except (ServerError, OSError):
            logger.exception("%s does not go back yet", plan.model)
            if time.monotonic() > deadline:
                reason += "; AND IT STILL HAS ITS SHARE, for the front door does not answer: run torchserve-dag routes"
                break
            time.sleep(LOOK_S)
    gone = replace(last, stage="back", share=0.0, reason=reason, ended=time.time()) if last else None
    if gone:
        store.save(gone)


def _read(path: Path) -> Progress | None:
    try:
        return plain.build(Progress, json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, plain.WrongDataError):
        return None
