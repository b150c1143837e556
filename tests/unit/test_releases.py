"""When a rollout stops, what an experiment says, and what is written into routes.yaml."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torchserve_dag.commands.release import STOP_IF
from torchserve_dag.front_door import routes_file
from torchserve_dag.front_door.door import Door
from torchserve_dag.front_door.splits import RolloutShare, ServedVersion
from torchserve_dag.releases import load_throttle, manual, plot, request_log, route_weights, stop_if, version_metrics
from torchserve_dag.releases.experiment import compare
from torchserve_dag.releases.load_throttle import LoadThrottle
from torchserve_dag.releases.request_log import LoggedRequest
from torchserve_dag.releases.rollout import Rollouts, weights_before
from torchserve_dag.releases.rollout_store import RolloutPlan, RolloutProgress, RolloutStore
from torchserve_dag.releases.version_metrics import VersionMetrics
from torchserve_dag.runtime.telemetry.scores import score_in
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.processes import workers_of
from torchserve_dag.server.state import State

PLAN = RolloutPlan("m", "2.0", (5.0, 100.0), 60.0, STOP_IF, 20, 3600.0, 600.0)


def took(
    requests: int, ms: float, errors: int = 0, slow: int = 0, given_up: tuple[int, float] = (0, 1)
) -> VersionMetrics:
    """So many requests within `ms`, and `slow` more within ten times that; and some that were given up after a time."""
    whole = requests + slow
    count, after = given_up
    return VersionMetrics(
        whole,
        errors,
        {ms / 2: 0, ms: requests, ms * 5: requests, ms * 10: whole, float("inf"): whole},
        {after / 2: 0, after: count, float("inf"): count},
    )


class TestStopIf:
    @pytest.mark.parametrize(
        ("text", "new", "stops"),
        [
            ("errors > 1%", took(10, 10, errors=1), False),  # it may be chance
            ("errors > 1%", took(100, 10, errors=10), True),
            ("errors > 1%", took(10_000, 10, errors=90), False),
            ("errors > 1%", took(10_000, 10, errors=150), True),
            ("errors > 2x", took(1000, 10, errors=50), True),
            ("p50 > 1.3x", took(50, 30), True),
            ("p50 > 1.3x", took(50, 12), False),
            ("p99 > 1.3x", took(1000, 10, slow=5), False),
            ("p99 > 1.3x", took(1000, 10, slow=60), True),
            ("p99 > 40ms", took(1000, 10, slow=60), True),
            ("p99 > 2s", took(1000, 10, slow=60), False),
            ("errors > 1% or p95 > 5ms", took(1000, 10), True),
            ("errors > 1%", VersionMetrics(), False),
            ("errors > 1%", took(100, 10, given_up=(3, 5000)), False),
            ("errors > 1%", took(10, 10, given_up=(10, 5000)), True),  # a version that hangs
            ("errors > 1%", took(0, 10, given_up=(10, 5000)), True),
            ("errors > 1%", took(0, 10, given_up=(1000, 4)), False),  # clients that cancel at once
            ("errors > 1% or p50 > 1.3x", took(100, 10, given_up=(5000, 0.1)), False),
        ],
    )
    def test_it_stops_where_it_is_sure(self, text: str, new: VersionMetrics, stops: bool) -> None:  # noqa: FBT001
        why = stop_if.reason(stop_if.read(text), new, took(1000, 10))

        assert bool(why) == stops

    def test_a_version_that_is_no_worse_than_the_old_one_goes_on(self) -> None:
        """Clients with deadlines of their own make both fail."""
        assert stop_if.reason(stop_if.read("errors > 1%"), took(1000, 10, errors=30), took(1000, 10, errors=30)) is None

    def test_a_good_version_is_hardly_ever_stopped_by_chance(self) -> None:
        """Half a percent of errors, looked at after each of a thousand requests, a hundred times over."""
        dice, (term,), stopped = random.Random(7), stop_if.read("errors > 1%"), 0
        for _ in range(100):
            errors = 0
            for requests in range(1, 1000):
                errors += dice.random() < 0.005
                if term.reason(VersionMetrics(requests, errors), VersionMetrics()):
                    stopped += 1
                    break

        assert stopped <= 3

    @pytest.mark.parametrize(
        "text", ["errors > 5", "errors > 5ms", "p99 > 5%", "p98 > 5ms", "nothing", "errors < 1%", ""]
    )
    def test_what_is_no_reason_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match=r"not a condition|not measured|percentage"):
            stop_if.read(text)


class TestMeasures:
    PAGE = """# TYPE envoy_tries_count counter
envoy_tries_count{version="rest:m/1.0",route="m",status="200",flags="-"} 90
envoy_tries_count{version="grpc:m/1.0?",route="m",status="500",flags="-"} 7
envoy_tries_count{version="rest:m/1.0!2.0",route="m",status="0",flags="UT"} 2
envoy_tries_count{version="rest:m/1.0",route="m x=y",status="0",flags="DC"} 5
envoy_tries_count{version="rest:m/1.0",route="m",status="408",flags="-"} 11
envoy_tries_count{version="rest:m/1.0",route="m",status="400",flags="-"} 13
envoy_tries_count{version="rest:m/1.0",route="m/1.0",status="500",flags="-"} 50
envoy_tries_count{version="rest:torchserve",route="ping",status="200",flags="-"} 5
envoy_tries_us_bucket{version="rest:m/1.0",route="m",le="1000"} 50
envoy_tries_us_bucket{version="grpc:m/1.0?",route="m",le="1000"} 1
envoy_tries_us_bucket{version="rest:m/1.0",route="m",le="2000"} 99
envoy_tries_us_bucket{version="grpc:m/1.0?",route="m",le="2000"} 1
envoy_tries_us_bucket{version="rest:m/1.0",route="m",le="+Inf"} 99
envoy_tries_given_up_ms_bucket{version="rest:m/1.0",route="m",status="408",flags="-",le="5"} 10
envoy_tries_given_up_ms_bucket{version="rest:m/1.0",route="m",status="408",flags="-",le="+Inf"} 11
envoy_tries_given_up_ms_bucket{version="rest:m/1.0",route="m",status="0",flags="DC",le="5"} 0
envoy_tries_given_up_ms_bucket{version="rest:m/1.0",route="m",status="0",flags="DC",le="+Inf"} 5
envoy_tries_given_up_ms_bucket{version="grpc:m/1.0?",route="m",status="0",flags="UF",le="+Inf"} 2
"""

    def test_protocols_and_clusters_of_a_version_are_added_up(self) -> None:
        """No answer at all is an error; what a client decides is none; and who names a version does not count."""
        found = version_metrics.parse(self.PAGE)

        assert found.keys() == {("m", "1.0")}
        one = found["m", "1.0"]
        assert (one.requests, one.errors, one.given_up_after(5)) == (99, 9, 6)
        assert one.buckets[1.0] == 51
        assert one.percentile(0.5) == pytest.approx(0.98, abs=0.03)
        assert one.slower_than(1.0) == 49

    @given(st.lists(st.integers(0, 50), min_size=3, max_size=3), st.lists(st.integers(0, 50), min_size=3, max_size=3))
    def test_what_came_since_is_the_rest(self, first: list[int], more: list[int]) -> None:
        def of(parts: list[int]) -> VersionMetrics:
            counts = [sum(parts[: i + 1]) for i in range(3)]
            return VersionMetrics(sum(parts), parts[0], dict(zip((1.0, 2.0, 4.0), counts, strict=True)))

        whole = of([a + b for a, b in zip(first, more, strict=True)])
        assert whole.since(of(first)) == of(more)


class TestExperiment:
    @staticmethod
    def arm(version: str, count: int, score: float, errors: int = 0, seed: int = 1) -> list[LoggedRequest]:
        dice = random.Random(seed)
        return [
            LoggedRequest(
                f"{version}-{i}", version, dice.gauss(20, 4), i < errors, fell_back=False, score=dice.gauss(score, 0.2)
            )
            for i in range(count)
        ]

    def test_a_clear_difference_is_settled_and_lies_in_its_interval(self) -> None:
        result = compare("m", [*self.arm("1.0", 900, 0.5), *self.arm("2.0", 400, 0.6, seed=2)])
        found = {one.what: one for one in result.differences}

        assert found["score"].settled
        assert found["score"].needed == 0
        assert found["score"].low < 0.1 < found["score"].high
        assert not found["errors"].settled
        assert found["errors"].needed is None

    def test_so_many_requests_as_it_says_settle_an_open_one(self) -> None:
        """Eighty times of a hundred; here more than fifty of a hundred must be."""
        few = [*self.arm("1.0", 60, 0.50, seed=3), *self.arm("2.0", 60, 0.51, seed=4)]
        found = next(one for one in compare("m", few).differences if one.what == "score")
        assert not found.settled
        assert found.needed
        each = (len(few) + found.needed) // 2
        settled = 0
        for seed in range(100):
            more = [
                *self.arm("1.0", each, found.first, seed=1000 + seed),
                *self.arm("2.0", each, found.second, seed=5000 + seed),
            ]
            settled += next(one for one in compare("m", more).differences if one.what == "score").settled

        assert 60 <= settled <= 95

    def test_a_version_that_fell_back_is_to_blame(self) -> None:
        bad = [LoggedRequest(f"b{i}", "2.0", 5.0, failed=False, fell_back=i < 30) for i in range(300)]
        result = compare("m", [*self.arm("1.0", 300, 0.5), *bad])

        errors = result.differences[0]
        assert (errors.what, errors.second, errors.settled) == ("errors", 0.1, True)

    def test_one_version_alone_is_compared_with_nothing(self) -> None:
        assert compare("m", self.arm("1.0", 10, 0.5)).differences == []

    def test_it_is_drawn_where_matplotlib_is_there(self, tmp_path: Path) -> None:
        requests = [*self.arm("1.0", 90, 0.5), *self.arm("2.0", 40, 0.6, seed=2)]
        result = compare("m", requests)
        if not find_spec("matplotlib"):
            with pytest.raises(ServerError, match="The plot needs matplotlib"):
                plot.draw(result, requests, tmp_path / "m.svg")
            return
        plot.draw(result, requests, tmp_path / "m.svg")

        assert "score: 2.0 less 1.0" in (tmp_path / "m.svg").read_text()


class TestRecords:
    def test_logs_and_older_logs_meet_by_the_requests_id(self, tmp_path: Path) -> None:
        line = {
            "route": "m", "first": "2.0", "version": "1.0", "duration_ms": 7, "status": 200, "grpc_status": None,
            "grpc_failure": None, "flags": "-", "cancels": None, "time": "2026-11-25T12:00:00.000Z",
        }  # fmt: skip
        older = {**line, "request_id": "a", "token": "alice"}
        newer = [
            {**line, "request_id": "b", "version": "2.0", "grpc_failure": "500"},
            {**line, "request_id": "c", "route": "m header x=y"},
            {**line, "request_id": "d", "status": 0, "flags": "DC"},
            {**line, "request_id": "e", "cancels": "a"},
            {**line, "request_id": "f", "status": 200, "grpc_failure": "408", "grpc_status": 4},
            {**line, "request_id": "g", "status": 400},
        ]
        (tmp_path / "requests.1.log").write_text(json.dumps(older) + "\n")
        (tmp_path / "requests.log").write_text("".join(json.dumps(one) + "\n" for one in newer) + '{"torn')
        (tmp_path / "requests.old.log").write_text("somebody's own")
        scores = [("1.0", 0.5), ("2.0", 0.1)]  # the second is of the try that failed
        (tmp_path / "scores.log").write_text(
            "".join(
                f'{{"request_id": "a", "model": "m", "version": "{v}", "score": {s}, "token": "alice"}}\n'
                for v, s in scores
            )
        )
        feedback = [("alice", 0.1), ("alice", 1), ("bob", 9)]
        (tmp_path / "feedback.log").write_text(
            "".join(f'{{"request_id": "a", "score": {s}, "token": "{token}"}}\n' for token, s in feedback)
            + '{"request_id": "d", "score": 1e308}\n[]\n"x"\n'
        )
        found = {one.id: one for one in request_log.read(tmp_path, "m")}

        assert found.keys() == {"a", "b", "d", "f", "g"}
        assert found["d"].feedback is None
        assert (found["f"].left, found["f"].failed, found["g"].refused, found["g"].failed) == (True, False, True, False)
        assert (found["a"].version, found["a"].fell_back, found["a"].score, found["a"].feedback) == (
            "2.0",
            True,
            0.5,
            1,
        )
        assert (found["b"].failed, found["d"].failed, found["d"].left) == (True, False, True)

    @pytest.mark.parametrize(
        ("answer", "path", "score"),
        [
            ({"a": {"b": 1}}, "a.b", 1.0),
            ({"a": True}, "a", None),
            ({}, "a", None),
            ({"a": float("nan")}, "a", None),
            ({"a": 1e308}, "a", None),
        ],
    )
    def test_a_score_is_a_number(self, answer: object, path: str, score: float | None) -> None:
        assert score_in(answer, path) == score


class TestWritten:
    TEXT = """# routes of this project
other:
  versions: {"1.0": 100}
m:                         # our best
  sticky: header x-user-id
  versions:                # by weight
    "1.0": 90
    "2.0": 10

  fallback: "1.0"
"""

    def test_only_the_weights_change(self, tmp_path: Path) -> None:
        path = tmp_path / "routes.yaml"
        path.write_text(self.TEXT)
        route_weights.write(tmp_path, "m", {"1.0": 0.5, "2.0": 99.5})
        after = path.read_text()

        assert after == self.TEXT.replace('"1.0": 90\n    "2.0": 10\n', '{"1.0": 0.5, "2.0": 99.5}\n')
        found = routes_file.read(tmp_path)
        assert found
        assert found.value["m"].versions == {"1.0": 0.5, "2.0": 99.5}

    @pytest.mark.parametrize(
        "text",
        [
            'm: {versions: {"1.0": 1}, sticky: header a}\n',
            'm: {versions: {\n  "1.0": 1,\n}}\n',
            'm:\n  versions:\n    "1.0": 1\n\n    # old\n    "2.0": 3  # new\n  fallback: "1.0"\n',
            '"m":\n    versions: {"1.0": 1}  # all\n',
            'n: {versions: {"1.0": 1}}\n---\n',
            'm: &all {versions: {"1.0": 1}}\nn: *all\n',
        ],
    )
    def test_it_is_right_afterwards_or_refused(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "routes.yaml"
        path.write_text(text)
        with contextlib.suppress(ServerError):
            route_weights.write(tmp_path, "m", {"2.0": 100})
        if path.read_text() == text:
            return
        before, after = yaml.safe_load(text), yaml.safe_load(path.read_text())
        before["m"]["versions"] = {"2.0": 100}

        assert after == before


class TestRollout:
    def test_one_rollout_of_a_model_at_a_time(self, tmp_path: Path) -> None:
        store = RolloutStore(State(tmp_path))
        store.request(PLAN)
        with pytest.raises(ServerError, match=r"m is being rolled out to 2\.0 already"):
            store.request(PLAN)

        assert [one.stage for one in store.all()] == ["waiting"]

    def test_a_rollout_that_changes_nothing_does_not_begin(self, tmp_path: Path) -> None:
        door = Door(State(tmp_path))
        door.begin(Addresses())
        with pytest.raises(ServerError, match=r"No version of m answers: torchserve-dag serve m/2\.0"):
            weights_before(tmp_path, door.traffic(), PLAN)
        door.change(
            lambda now: replace(now, served=(ServedVersion("m", "2.0", 60.0, ours=True),), defaults={"m": "2.0"})
        )

        with pytest.raises(ServerError, match=r"m/2\.0 answers all requests already"):
            weights_before(tmp_path, door.traffic(), PLAN)

    def test_what_was_under_way_is_over_when_the_server_starts_again(self, tmp_path: Path) -> None:
        store = RolloutStore(State(tmp_path))
        store.save(RolloutProgress(PLAN, stage="rolling", share=25.0))
        store.forget_running()

        assert [(one.stage, one.reason) for one in store.all()] == [("back", "the server was stopped")]

    def test_what_a_killed_keeper_ran_gives_its_share_back(self, tmp_path: Path) -> None:
        """The next keeper does that; no Envoy runs at this moment, and the next one reads it from the files."""
        door, store = Door(State(tmp_path)), RolloutStore(State(tmp_path))
        door.begin(Addresses())
        door.change(lambda now: replace(now, rollouts={"m": RolloutShare("2.0", 0.25)}))
        store.save(RolloutProgress(PLAN, stage="rolling", share=25.0))
        Rollouts(tmp_path).roll_back_running()

        wait_for(lambda: store.all()[0].over)
        assert (store.all()[0].stage, store.all()[0].reason) == ("back", "the keeper, which ran it, was killed")
        assert door.traffic().rollouts == {}


def test_taking_the_routes_takes_back_what_a_rollout_that_is_over_has_left(
    tmp_path: Path,
) -> None:
    """Envoy may have been down when it was rolled back; a running rollout is kept."""
    state = State(tmp_path)
    door, store = Door(state), RolloutStore(state)
    door.folder.mkdir(parents=True)
    door.begin(Addresses())
    door.change(lambda now: replace(now, rollouts={"m": RolloutShare("2.0", 0.5), "n": RolloutShare("2.0", 0.5)}))
    store.save(RolloutProgress(PLAN, stage="back"))
    store.save(RolloutProgress(replace(PLAN, model="n"), stage="rolling"))

    assert manual.reload_routes(tmp_path).rollouts.keys() == {"n"}


# A new version's workers, beside those that serve.

BUSY = "while True: pass"


@pytest.fixture
def processes() -> Iterator[Callable[..., psutil.Process]]:
    """Starts processes that compute all the time, as TorchServe would its workers."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*words: str) -> psutil.Process:
        started.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", BUSY, *words]))
        return psutil.Process(started[-1].pid)

    yield start
    for one in started:
        one.kill()
        one.wait()


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def test_workers_that_load_leave_the_cores_to_those_who_serve(processes: Callable[..., psutil.Process]) -> None:
    cores = os.cpu_count() or 1
    serving = [processes("--sock-name", f"/tmp/.ts.sock.{i}") for i in range(cores)]
    new = [processes("--sock-name", f"/tmp/.ts.sock.{100 + i}") for i in range(cores)]
    with LoadThrottle(psutil.Process()) as throttle:
        throttle.assign(str(100 + i) for i in range(cores))
        time.sleep(3 * load_throttle.CHECK_EVERY_S)
        before = [used(one) for one in (*serving, *new)]
        deadline = time.monotonic() + 60
        while True:  # long enough for a few slices of those that load, however busy the machine is
            spent = [used(one) - was for one, was in zip((*serving, *new), before, strict=True)]
            if (sum(spent) > cores and sum(spent[cores:]) > 0) or time.monotonic() > deadline:
                break
            time.sleep(0.1)

    assert 0 < sum(spent[cores:]) < 0.25 * sum(spent)  # without it, half
    assert psutil.STATUS_STOPPED not in {one.status() for one in new}


def test_workers_that_load_use_cores_that_are_idle(
    processes: Callable[..., psutil.Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_throttle, "idle_cores", lambda: 1)
    new = [processes("--port", str(9000 + i)) for i in range(2)]
    with LoadThrottle(psutil.Process()) as throttle:
        throttle.assign(["9000", "9001"])
        time.sleep(3 * load_throttle.CHECK_EVERY_S)
        before = [used(one) for one in new]
        wait_for(lambda: all(used(one) > was for one, was in zip(new, before, strict=True)))  # each has its turns
        new[0].kill()
        time.sleep(2 * load_throttle.CHECK_EVERY_S)
        throttle.assign([])
        wait_for(lambda: new[1].status() != psutil.STATUS_STOPPED)  # it is not held any more
        time.sleep(2 * load_throttle.CHECK_EVERY_S)
        assert new[1].status() != psutil.STATUS_STOPPED


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_workers_are_known_by_their_socket(processes: Callable[..., psutil.Process]) -> None:
    for words in (["--sock-name", "/tmp/.ts.sock.1"], ["--port", "1000"], ["--model", "100"], []):
        processes(*words)
    new = {processes("--sock-name", "/tmp/.ts.sock.100").pid, processes("--port", "10").pid}

    wait_for(lambda: workers_of(psutil.Process(), frozenset({"100", "10"})) == new)  # once each has its arguments
    assert workers_of(psutil.Process(), frozenset()) == set()
