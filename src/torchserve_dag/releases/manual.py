"""Promote a rollout, roll one back, and reload routes.yaml, on command."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from torchserve_dag.clients.models import version_key
from torchserve_dag.front_door import routes_file
from torchserve_dag.front_door.door import Door, Traffic
from torchserve_dag.releases.rollout import reject, settle
from torchserve_dag.releases.rollout_store import RolloutProgress, RolloutStore
from torchserve_dag.server import releases_file
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.state import State

ANSWER_S = 20.0
"""How long the keeper may take to obey a command; it checks for commands twice a second."""


def promote(root: Path, model: str) -> RolloutProgress:
    """Send all requests to the new version of the running rollout, now. Raises ServerError."""
    return _command(root, model, promoted=True)


def roll_back(root: Path, model: str) -> RolloutProgress:
    """Restore the weights from before a model's last rollout, whether it is running or done. Raises ServerError."""
    store = RolloutStore(State(root))
    last = store.progress(model)
    if last is None:
        raise ServerError(f"{model} was never rolled out: there is nothing to roll back.")
    if not last.over:
        return _command(root, model, promoted=False)
    state, version = State(root), last.plan.version
    traffic = Door(state).traffic()
    if last.stage == "back":
        split = traffic.split(model)
        answers = ", ".join(f"{one} {share:.0%}" for one, share in split.shares.items()) if split else ""
        raise ServerError(
            f"The last rollout of {model}, to {version}, was rolled back already ({last.reason.rstrip('.')}); now "
            f"{answers or 'no version'} of it answers. For another version: torchserve-dag default {model} VERSION at "
            f"once, or torchserve-dag rollout {model} VERSION in steps."
        )
    served = {one.version for one in traffic.served if one.model == model}
    missing = [one for one, weight in last.before.items() if weight and one not in served]
    if missing:
        raise ServerError(
            f"{model}/{missing[0]} is no longer served: torchserve-dag serve {model}/{missing[0]} loads it; "
            "then roll back."
        )
    reason = "it was rolled back by hand"
    settle(root, model, last.before, f"rolled back from {version}")
    reject(state, model, version, reason)
    rolled_back = replace(last, stage="back", share=0.0, reason=reason, ended=time.time())
    store.save(rolled_back)
    return rolled_back


def reload_routes(root: Path) -> Traffic:
    """Apply `routes.yaml` as it is now. Raises ServerError or CheckError; then nothing has changed."""
    door = Door(State(root))
    in_file, traffic = routes_file.read(root), door.traffic()
    known: dict[str, list[str]] = {}
    for one in traffic.served:
        known.setdefault(one.model, []).append(one.version)
    if in_file is not None:
        in_order = {model: sorted(versions, key=version_key) for model, versions in known.items()}
        routes_file.check(in_file, in_order, "torchserve-dag serve NAME/VERSION loads another")
        for model, route in in_file.value.items():  # a version that routes.yaml names is also loaded at later starts
            releases_file.forgive(door.state, model, route.named)

    def change(now: Traffic) -> Traffic:
        """Also drop the shares of rollouts that are over: one may have been rolled back while Envoy was down."""
        going = {model for model in now.rollouts if (last := store.progress(model)) and not last.over}
        rollouts = {model: rolling for model, rolling in now.rollouts.items() if model in going}
        return replace(now, routes={} if in_file is None else in_file.value, rollouts=rollouts)

    store = RolloutStore(door.state)
    return door.change(change)


def _command(root: Path, model: str, *, promoted: bool) -> RolloutProgress:
    store = RolloutStore(State(root))
    last = store.progress(model)
    if last is None or last.over:
        raise ServerError(f"No rollout of {model} is running: start one with torchserve-dag rollout.")
    store.command(model, "promote" if promoted else "rollback")
    deadline = time.monotonic() + ANSWER_S
    while not (now := store.progress(model) or last).over:
        if time.monotonic() > deadline:
            store.command(model, None)
            raise ServerError(
                f"The rollout of {model} did not react within {ANSWER_S:g} s (stage: {now.stage}): try again later."
            )
        time.sleep(0.05)
    store.command(model, None)
    return now
