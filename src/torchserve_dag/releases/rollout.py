"""A rollout: a new version gets a growing share of the requests, and is rolled back if it is worse than the old one.

The front door's keeper runs rollouts (`run`). It saves their progress to files, and commands reach it through files
(`RolloutStore`). So a rollout continues when the terminal is closed, and ends when the server is stopped.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torchserve_dag.archives.archive import ModelVersion, copies, read_store
from torchserve_dag.clients import ServingError
from torchserve_dag.front_door.door import Door, Traffic, set_rollout
from torchserve_dag.front_door.splits import RolloutShare
from torchserve_dag.releases import route_weights, stop_if, version_metrics, versions
from torchserve_dag.releases.rollout_store import (
    WHOLE,
    Command,
    RolloutPlan,
    RolloutProgress,
    RolloutStore,
    StepMetrics,
)
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.server import defaults, launch, releases_file
from torchserve_dag.server.connect import management_client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

logger = logging.getLogger(__name__)

POLL_S = 0.5
ENVOY_DOWN_S = 30.0
"""How long Envoy may be down during a rollout: the keeper restarts it within seconds."""
ROLL_BACK_S = 600.0
"""How long rolling back is retried."""


class Rollouts:
    """Runs requested rollouts, each in a thread of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = RolloutStore(State(root))
        self._threads: dict[str, threading.Thread] = {}

    def roll_back_running(self) -> None:
        """Roll back, at the keeper's start, the rollouts that an earlier keeper left when it was killed."""
        for one in self.store.all():
            if not one.over and one.stage != "waiting":
                target = partial(_roll_back_left, State(self.root), self.store, one)
                threading.Thread(target=target, name="roll back", daemon=True).start()

    def start_requested(self) -> None:
        """Start the rollouts that were requested since the last call."""
        for one in self.store.all():
            running = self._threads.get(one.plan.model)
            if one.stage == "waiting" and not (running and running.is_alive()):
                thread = threading.Thread(target=run, args=(self.root, one), name="rollout", daemon=True)
                self._threads[one.plan.model] = thread
                thread.start()


def run(root: Path, requested: RolloutProgress) -> None:
    """Run one rollout: load the version, take every step, and finish or roll back."""
    state = State(root)
    store = RolloutStore(state)
    now = requested
    try:
        now = _load(root, state, store, requested)
        for share in requested.plan.steps:
            now = _step(Door(state), store, replace(now, share=share))
        reason = now.reason or "all steps passed"
        settle(root, requested.plan.model, {requested.plan.version: WHOLE}, f"rolled out: {reason}")
        store.save(replace(now, stage="done", share=WHOLE, reason=reason, ended=time.time()))
    except _NotBegunError as why:
        store.save(replace(now, stage="back", reason=str(why), ended=time.time()))
    except _RollBackError as why:
        _roll_back(state, store, requested.plan, str(why))
    except Exception as error:
        logger.exception("rollout of %s", requested.plan.model)
        _roll_back(state, store, requested.plan, str(error))


def weights_before(root: Path, traffic: Traffic, plan: RolloutPlan) -> dict[str, float]:
    """The weights of a model's versions, in percent, before a rollout. Raises ServerError if it cannot begin."""
    split = traffic.split(plan.model)
    if split is None or not split.weights:
        raise ServerError(f"No version of {plan.model} answers: torchserve-dag serve {plan.model}/{plan.version}.")
    before = {version: share * WHOLE for version, share in split.shares.items() if share}
    if before.keys() == {plan.version}:
        raise ServerError(f"{plan.model}/{plan.version} answers all requests already: there is nothing to roll out.")
    versions.find_archive(State(root), plan.model, plan.version)
    if plan.model in traffic.routes:
        route_weights.check(root, plan.model)
    return before


def settle(root: Path, model: str, weights: Mapping[str, float], reason: str) -> None:
    """Make these weights permanent: in `routes.yaml` if it names the model; the version with the largest weight becomes
    the default, in `releases.yaml` too. Raises ServerError.
    """
    state = State(root)
    door = Door(state)
    weights = {version: weight for version, weight in weights.items() if weight}
    if not weights:
        raise ServerError(f"No version of {model} has a weight above 0.")
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
    with management_client(state) as client:
        defaults.set_default(state, client, model, version, reason)
    releases_file.forgive(state, model, weights)  # an earlier rollout of one of them may have been rolled back


def reject(state: State, model: str, version: str, reason: str) -> None:
    """No later start loads this version. Raises CheckError, ServerError, OSError."""
    archive = copies(state.archives).get((model, version))
    if archive is None:  # it could not be loaded
        record = state.record()
        found = read_store(Path(record.store)).archives.get((model, version), ()) if record else ()
        archive = found[0] if len(found) == 1 else None
    releases_file.decide(state, "rejected", model, version, archive.hash if archive else "", reason)


class _RollBackError(Exception):
    """Why a rollout is rolled back: one sentence."""


class _NotBegunError(Exception):
    """Why a rollout does not begin, which says nothing about its version: one sentence."""


def _load(root: Path, state: State, store: RolloutStore, requested: RolloutProgress) -> RolloutProgress:
    plan, traffic = requested.plan, Door(state).traffic()
    try:
        before = weights_before(root, traffic, plan)
    except ServerError as error:
        raise _NotBegunError(str(error).rstrip(".")) from None
    now = replace(requested, stage="loading", before=before)
    store.save(now)
    if not _is_served(traffic, plan):
        try:
            with management_client(state) as client:
                versions.load(
                    state, client, plan.model, plan.version, plan.ready_s, lambda: _check_command(store, plan)
                )
        except (ServerError, ServingError) as error:
            raise _RollBackError(f"{plan.version} could not be loaded: {error}") from None
    return replace(now, stage="rolling")


def _check_command(store: RolloutStore, plan: RolloutPlan) -> Command | None:
    """The pending command. Raises _RollBackError if it is to roll back."""
    command = store.pending_command(plan.model)
    if command == "rollback":
        raise _RollBackError("it was rolled back by hand")
    return command


def _is_served(traffic: Traffic, plan: RolloutPlan) -> bool:
    return any((one.model, one.version) == (plan.model, plan.version) for one in traffic.served)


def _step(door: Door, store: RolloutStore, now: RolloutProgress) -> RolloutProgress:
    """Hold one share until the step is complete. Raises _RollBackError if the new version is worse."""
    plan = now.plan
    if now.reason:  # promoted: skip the remaining steps
        return replace(now, share=WHOLE)
    door.change(set_rollout(plan.model, RolloutShare(plan.version, now.share / WHOLE)))
    others = {version: share for version, share in now.before.items() if version != plan.version}
    conditions, old_version = stop_if.read(plan.stop_if), max(others, key=lambda one: others[one])
    begin, since = _read_metrics(door), time.monotonic()
    while True:
        time.sleep(POLL_S)
        found, took = _read_metrics(door), time.monotonic() - since
        new = _of(found, plan.model, plan.version).since(_of(begin, plan.model, plan.version))
        old = _of(found, plan.model, old_version).since(_of(begin, plan.model, old_version))
        if not old.requests:  # at 100 % the old version gets no requests: compare with its metrics before this step
            old = _of(begin, plan.model, old_version)
        shown = replace(now, new=StepMetrics.of(new), old=StepMetrics.of(old))
        store.save(shown)
        if _check_command(store, plan) == "promote":
            return replace(shown, share=WHOLE, reason="it was promoted by hand")
        why = stop_if.reason(conditions, new, old)
        if why:
            raise _RollBackError(why)
        if took >= plan.every_s and new.requests >= plan.at_least:
            return shown
        if took >= max(plan.every_s, plan.patience_s):
            raise _RollBackError(
                f"after {took:.0f} s the step had only {new.requests} of the {plan.at_least} requests that it needs"
            )


def _read_metrics(door: Door) -> Mapping[ModelVersion, VersionMetrics]:
    """The metrics of all versions; waits while Envoy is being restarted."""
    deadline = time.monotonic() + ENVOY_DOWN_S
    while True:
        try:
            return version_metrics.read(door.admin)
        except ServerError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)


def _of(all_metrics: Mapping[ModelVersion, VersionMetrics], model: str, version: str) -> VersionMetrics:
    return all_metrics.get((model, version), VersionMetrics())


def _roll_back(state: State, store: RolloutStore, plan: RolloutPlan, reason: str, *, rejects: bool = True) -> None:
    """Restore the former weights. If it `rejects` the version, later starts do not load it."""
    last = store.progress(plan.model)
    door, deadline = Door(state), time.monotonic() + ROLL_BACK_S
    while True:
        try:
            door.change(set_rollout(plan.model, None))
            break
        except (ServerError, OSError):
            logger.exception("%s cannot be rolled back yet", plan.model)
            if time.monotonic() > deadline:
                reason += "; IT STILL GETS ITS SHARE, because the front door does not answer: run torchserve-dag routes"
                break
            time.sleep(POLL_S)
    try:
        if rejects:
            reject(state, plan.model, plan.version, reason)
    except (CheckError, ServerError, OSError) as error:
        logger.exception("%s cannot be rejected", plan.version)
        reason += f"; {releases_file.FILE} could not be written ({error}), so the next start loads it again"
    rolled_back = replace(last, stage="back", share=0.0, reason=reason, ended=time.time()) if last else None
    if rolled_back:
        store.save(rolled_back)


def _roll_back_left(state: State, store: RolloutStore, left: RolloutProgress) -> None:
    """Roll back a rollout that nobody runs any more, which is no fault of its version.

    A version that was being loaded is unregistered.
    """
    plan = left.plan
    try:
        _roll_back(state, store, plan, "the keeper, which ran it, was killed", rejects=False)
        if not _is_served(Door(state).traffic(), plan):
            with management_client(state) as client:
                launch.unregister(client, plan.model, plan.version)
    except (ServerError, ServingError) as error:  # TorchServe is gone too: it starts again without the version
        logger.warning("the rollout of %s: %s", plan.model, error)
