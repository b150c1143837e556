"""A revocation waits for nothing: no lock, no other file, no space on the disk."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.envoy_alone import Alone, alone
from torchserve_dag.front_door import dynamic_files
from torchserve_dag.front_door.door import Door
from torchserve_dag.runtime.data import plain
from torchserve_dag.server.errors import ServerError

IN_A_FULL_DISK = """
    import json, os, sys
    from pathlib import Path
    from torchserve_dag.front_door.door import Door
    from torchserve_dag.server.state import State

    door = Door(State(Path(sys.argv[1])))
    for i in range(20):
        door.issue_token(f"t{i}", 3600)
    wanted = {token.id for token in door.tokens.issued() if token.name not in {"t3", "t4"}}
    with open(Path(sys.argv[1]) / "full", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass
    try:
        door.issue_token("one more", 3600)
    except Exception as error:
        print(error)
    try:
        door.issue_token("more", 3600)
    except OSError as error:
        print(error.filename)
    door.revoke_token("t3")
    door.revoke_token("t4")
    text = (door.folder / "accepted_tokens.json").read_text()
    print(len(json.loads(text)["resources"]), sum(one in text for one in wanted), "jti" in text, len(text.split("exact")))
"""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """It answers 404 for every model, and 403 to a token that was revoked."""
    with alone(tmp_path_factory.mktemp("project")) as running:
        yield running


def test_a_token_is_accepted_until_it_is_revoked(running: Alone) -> None:
    ann, bob = (running.door.issue_token(name, 3600) for name in ("ann", "bob"))
    assert (running.status(ann), running.status(bob)) == (404, 404)
    running.door.revoke_token("ann")

    assert (running.status(ann), running.status(bob)) == (403, 404)


def test_neither_a_held_lock_nor_broken_traffic_holds_it_up(running: Alone) -> None:
    token = running.door.issue_token("carol", 3600)
    traffic = running.door.folder / "traffic.json"
    before = traffic.read_text()
    with (running.door.folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        traffic.write_text("{")
        running.door.revoke_token("carol")
    traffic.write_text(before)

    assert running.status(token) == 403


def test_while_envoy_is_stopped_it_is_done_already(running: Alone) -> None:
    """Envoy reads the file when it starts."""
    running.door.issue_token("dave", 3600)
    (token,) = (one for one in running.door.tokens.issued() if one.name == "dave")
    file = running.door.folder / dynamic_files.ACCEPTED
    assert token.id in file.read_text()
    Door(running.door.state).tokens.revoke("dave")
    running.door._write_accepted()

    assert token.id not in file.read_text()


def test_a_change_that_cannot_be_rendered_changes_nothing(running: Alone) -> None:
    """What the next change, or the next revocation, would stumble over is never written."""
    before = running.door.traffic()
    token = running.door.issue_token("erin", 3600)

    def breaks(_: object) -> object:
        return plain.build(type(before), {**plain.flatten(before), "leaving": [
            {"model": "m", "version": "1", "timeout_s": float("inf"), "ours": True}
        ]})  # fmt: skip

    with pytest.raises(ValueError, match="not JSON compliant"):
        running.door.change(breaks)  # type: ignore[arg-type]
    assert running.door.traffic() == before
    assert running.status(token) == 404
    running.door.change(lambda traffic: traffic)


def test_a_token_whose_rate_limit_envoy_did_not_take_is_not_left(running: Alone) -> None:
    (running.door.folder / "traffic.json").rename(running.door.folder / "away.json")
    with pytest.raises(ServerError):
        running.door.issue_token("frank", 3600)
    (running.door.folder / "away.json").rename(running.door.folder / "traffic.json")

    assert "frank" not in {token.name for token in running.door.tokens.issued()}


def test_a_full_disk_keeps_no_token_alive(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(IN_A_FULL_DISK))
    (tmp_path / "disk").mkdir()
    mount = f'mount -t tmpfs -o size=256k none "{tmp_path}/disk" && exec "$@"'
    command = ["unshare", "-rm", "sh", "-c", mount, "sh", sys.executable, str(script), str(tmp_path / "disk")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"this machine lets nobody mount a small disk: {done.stderr.strip()}")

    assert done.returncode == 0, done.stderr
    refused, file, revoked = done.stdout.splitlines()
    assert "is no name of a token" in refused
    assert file.endswith("/tokens/more.json")
    assert revoked == "1 18 True 19"
