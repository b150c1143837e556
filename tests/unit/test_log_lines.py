"""The logs of all processes as one: in the order of time, by model, by request."""

from __future__ import annotations

import datetime as dt
import gzip
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.stack import log_lines
from torchserve_dag.stack.log_lines import Entry, Wanted

WITHIN_S = 120
DAY = dt.datetime.now().astimezone() - dt.timedelta(minutes=30)


def at(second: int, millisecond: int = 0) -> str:
    """A local time of the last hour, as log4j writes it."""
    return f"{DAY + dt.timedelta(seconds=second):%Y-%m-%dT%H:%M:%S},{millisecond:03}"


def request(second: int, **fields: Any) -> str:
    when = (DAY + dt.timedelta(seconds=second)).astimezone(dt.timezone.utc)
    whole = {"status": 200, "method": "POST", "duration_ms": 3, "details": "via_upstream", **fields}
    return json.dumps({"time": f"{when:%Y-%m-%dT%H:%M:%S}.500Z", **whole}) + "\n"


def worker(second: int, message: str, thread: str = "W-9000-m_1.0-stdout") -> str:
    return f"{at(second)} [INFO ] {thread} MODEL_LOG - {message}\n"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    folder = tmp_path / ".torchserve-dag" / "logs"
    folder.mkdir(parents=True)
    (tmp_path / "workflows").mkdir()
    (folder / "requests.1.log").write_text(request(1, request_id="r1", model="m", first="1.0", version="1.0"))
    (folder / "requests.log").write_text(
        request(5, request_id="r2", model="m", first="2.0", version="2.0", status=500, duration_ms=4)
        + request(6, request_id="r3", model="other", first="1.0", version="1.0")
        + '{"torn'
    )
    older = worker(2, "fault 0a1b2c3d: m: infer raised") + worker(2, "  | Traceback:", "W-9001-other_1.0-stdout")
    older += worker(2, "  | Traceback (most recent call last):") + worker(2, "  | ValueError: \x1b[31mbad")
    with gzip.open(folder / "model_log.1.log.gz", "wb") as packed:
        packed.write(older.encode())
    (folder / "model_log.log").write_text(
        worker(5, "request r2: m: m failed in infer. (fault 0a1b2c3d)")
        + worker(5, "request r22: m: m failed in infer. (fault 99999999)")
        + worker(6, "hello", "W-9001-other_1.0-stdout")
    )
    (folder / "ts_log.log").write_text(f"{at(3)} [WARN ] main org.x - it\nat a.b.C\nat d.e.F\n")
    (folder / "front_door.log").write_text(f"[{at(4).replace('T', ' ').replace(',', '.')}][7][warning][x] m is odd\n")
    (folder / "keeper.log").write_text(f"{at(0).replace('T', ' ')} [WARNING] keeper - began\n")
    (folder / "scores.log").write_text('{"request_id": "r1", "score": 1}\n')
    for age, name in enumerate(("requests.1.log", "model_log.1.log.gz")):
        os.utime(folder / name, (DAY.timestamp() + age, DAY.timestamp() + age))
    return folder


def texts(found: list[Entry]) -> list[str]:
    return [entry.text.partition("\n")[0][:20] for entry in found]


def test_all_logs_are_one_in_the_order_of_time(logs: Path) -> None:
    found = log_lines.read(logs, Wanted())

    assert [entry.source for entry in found] == [
        "keeper", "request", "worker", "worker", "torchserve", "envoy", "worker", "worker", "request", "worker",
        "request",
    ]  # fmt: skip
    assert found[4].text.splitlines()[1:] == ["  | at a.b.C", "  | at d.e.F"]
    assert "200  POST m/1.0  3 ms  request r1" in found[1].text


def test_a_model_has_its_workers_its_requests_and_what_names_it(logs: Path) -> None:
    assert texts(log_lines.read(logs, Wanted("m", "2.0"))) == ["500  POST m/2.0  4 m"]
    assert {entry.source for entry in log_lines.read(logs, Wanted("m"))} == {"request", "worker", "envoy"}
    assert not [entry for entry in log_lines.read(logs, Wanted("m")) if entry.model == "other"]


def test_a_request_has_its_lines_and_the_exception_behind_its_failure(logs: Path) -> None:
    """The traceback was logged for another request, up to a minute earlier, and its file was rotated since."""
    found = log_lines.read(logs, Wanted(request="r2"))

    assert texts(found) == ["fault 0a1b2c3d: m: i", "request r2: m: m fai", "500  POST m/2.0  4 m"]
    assert found[0].text.splitlines()[-1] == "  | ValueError: \x1b[31mbad"


def test_only_the_last_time_is_shown(logs: Path) -> None:
    begin = (DAY + dt.timedelta(seconds=5)).replace(microsecond=0)

    assert {entry.source for entry in log_lines.read(logs, Wanted(since=begin))} == {"worker", "request"}


def test_what_is_logged_from_now_on_is_followed_over_a_rotation(logs: Path) -> None:
    got: list[str] = []

    def collect() -> None:
        for entry in log_lines.follow(logs, Wanted("m")):
            got.append(entry.text)
            if entry.text == "more":
                return

    reading = threading.Thread(target=collect, daemon=True)
    reading.start()
    deadline = time.monotonic() + WITHIN_S
    path = logs / "model_log.log"
    with path.open("a") as file:
        while not got:
            assert time.monotonic() < deadline
            file.write(worker(7, "one"))
            file.flush()
            reading.join(0.1)
        path.rename(logs / "model_log.2.log")
        file.write(worker(8, "last of the old"))
    path.write_text(worker(9, "first of the new"))
    with path.open("a") as file:
        while reading.is_alive():
            assert time.monotonic() < deadline, got
            file.write(worker(9, "more"))
            file.flush()
            reading.join(0.1)

    assert list(dict.fromkeys(got)) == ["one", "last of the old", "first of the new", "more"]


class TestCommand:
    def run(self, logs: Path, *options: str) -> Any:
        return CliRunner().invoke(app, ["logs", "--project", str(logs.parents[1]), *options])

    def test_a_terminal_obeys_nothing_of_what_a_client_wrote(self, logs: Path) -> None:
        said = self.run(logs, "m", "--request", "r2")

        assert said.exit_code == 0
        assert "ValueError: \\x1b[31mbad" in said.stdout
        assert "\x1b[31m" not in said.stdout

    def test_programs_get_json(self, logs: Path) -> None:
        found = [json.loads(line) for line in self.run(logs, "--request", "r2", "--json").stdout.splitlines()]

        assert [one["source"] for one in found] == ["worker", "worker", "request"]
        assert found[2]["request"]["duration_ms"] == 4

    def test_nothing_found_is_said(self, logs: Path, tmp_path: Path) -> None:
        (tmp_path / "new" / "workflows").mkdir(parents=True)

        assert "nothing about a request r9" in self.run(logs, "--request", "r9").stderr
        assert "There are no logs" in CliRunner().invoke(app, ["logs", "--project", str(tmp_path / "new")]).stderr
        assert '"soon" is not a time' in self.run(logs, "--since", "soon").stderr
