"""Replace the workers of a version one by one: each leaves when its successor is ready, so no request is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import quote

import httpx

from torchserve_dag.clients import VersionInfo
from torchserve_dag.server.connect import MANAGEMENT, host_tokens, management_client, running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.sockets import SocketTransport
from torchserve_dag.server.state import State

POLL_S = 0.2


def restart(
    state: State, model: str, version: str | None, timeout_s: float, show: Callable[[int, int], None] | None = None
) -> tuple[str, int]:
    """Replace the workers of a version, without one of the default version; the version, and how many were replaced.

    `show` gets the number of workers that are replaced so far, and that of all. Raises ServerError.
    """
    if running(state).host != "direct":
        raise ServerError("TorchServe replaces no workers under load: restart is the direct host's (up --host direct).")
    before = _info(state, model, version)
    old, deadline = {worker.id for worker in before.workers}, time.monotonic() + timeout_s
    _ask(state, f"/models/{quote(model, safe='')}/{quote(before.version, safe='')}/restart")
    while True:
        now = _info(state, model, before.version)
        new = sum(worker.ready and worker.id not in old for worker in now.workers)
        if show:
            show(new, now.min_workers)
        if new >= now.min_workers and not any(worker.id in old for worker in now.workers):
            return before.version, new
        if now.failure:
            raise ServerError(f"The new workers of {model}/{before.version} do not start: {now.failure.rstrip('.')}.")
        if time.monotonic() > deadline:
            raise ServerError(f"{model}/{before.version} has {new} new workers after {timeout_s:g} s; it goes on.")
        time.sleep(POLL_S)


def _info(state: State, model: str, version: str | None) -> VersionInfo:
    with management_client(state) as client:
        every = [one for info in client.models() if info.name == model for one in info.versions]
    found = [one for one in every if (one.version == version if version else one.default)]
    if not found:
        which = f"{model}/{version}" if version else model
        raise ServerError(f"{which} is not served: torchserve-dag status shows what is.")
    return found[0]


def _ask(state: State, path: str) -> None:
    key = host_tokens(state).management
    try:
        with httpx.Client(transport=SocketTransport(state.direct / MANAGEMENT), timeout=30, trust_env=False) as client:
            answer = client.post(f"http://keeper{path}", headers={"authorization": f"Bearer {key}"})
    except (OSError, httpx.HTTPError) as error:
        raise ServerError(f"The keeper does not answer ({type(error).__name__}): try again.") from None
    if not answer.is_success:
        raise ServerError(str(answer.json().get("message", answer.text)))
