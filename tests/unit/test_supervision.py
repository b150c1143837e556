"""Who watches whom, with real processes that are killed: records, restarts, pauses, and the end of all in any state."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from torchserve_dag.front_door import envoy
from torchserve_dag.server import processes
from torchserve_dag.server.connect import running
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import ServerRecord, Serving, State
from torchserve_dag.server.supervised import ROLES, Role, Supervised
from torchserve_dag.stack import start as stack
from torchserve_dag.stack import supervise, watch
from torchserve_dag.stack.watch import Watch

WITHIN_S = 120
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path)
    state.prepare()
    yield state
    processes.kill(processes.family(state))


@pytest.fixture
def supervised(state: State) -> Supervised:
    return Supervised(state)


def run(supervised: Supervised, role: Role, *, ignores_sigterm: bool = False) -> int:
    """A process in the place of a real one."""
    code = "import signal; signal.signal(15, signal.SIG_IGN);" if ignores_sigterm else ""
    pid = processes.spawn([sys.executable, "-c", f"{code}import time; time.sleep(600)"], supervised.state)
    supervised.started(role, pid)
    return pid


def wait_for(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def end(pid: int) -> None:
    process = psutil.Process(pid)
    process.kill()
    wait_for(lambda: not processes.alive(process))


def test_a_process_is_found_by_its_record_and_not_mistaken_for_a_later_one(supervised: Supervised) -> None:
    pid = run(supervised, "Envoy")
    found = supervised.process("Envoy")
    assert found
    assert found.pid == pid
    assert os.getsid(pid) == pid, "no signal to this group reaches it"

    record = supervised.record("Envoy")
    assert record
    supervised._save("Envoy", type(record)(pid, record.ticks - 1, record.since))  # the pid was used again since
    assert supervised.process("Envoy") is None


def test_a_blocked_signal_does_not_end_a_process(supervised: Supervised) -> None:
    pid = processes.spawn(SLEEP, supervised.state, blocked=[signal.SIGTERM])
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)

    assert processes.alive(psutil.Process(pid))
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, []), "it is blocked there alone"


class TestWatch:
    def test_what_ends_is_started_again_and_what_runs_is_left_alone(self, supervised: Supervised) -> None:
        watcher = Watch(supervised, "Envoy", lambda: started.append(run(supervised, "Envoy")))
        started: list[int] = []
        watcher.look()
        watcher.look()
        assert len(started) == 1
        end(started[0])
        watcher.look()

        assert len(started) == 2
        found = supervised.process("Envoy")
        assert found
        assert found.pid == started[1]

    def test_pauses_grow_and_the_reason_is_recorded(
        self, supervised: Supervised, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(watch.time, "monotonic", lambda: now[0])
        tries: list[float] = []

        def start() -> None:
            tries.append(now[0])
            raise ServerError("port 8443 is in use.")

        end(run(supervised, "Envoy"))
        watcher = Watch(supervised, "Envoy", start, lambda: "out of memory")
        supervised.state.save_serving(Serving())
        watcher.look()
        while now[0] < 1030:
            now[0] += 0.5
            watcher.look()

        pauses = [after - before for before, after in itertools.pairwise(tries)]
        assert pauses[:5] == [0.5, 1, 2, 3, 5]  # the first at the next look
        assert set(pauses[5:]) == {5}
        assert "(port 8443 is in use), the " in supervised.problem("Envoy")

    def test_the_pauses_begin_anew_after_a_while(self, supervised: Supervised, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watch, "STEADY_S", 0.0)
        started: list[int] = []
        watcher = Watch(supervised, "Envoy", lambda: started.append(run(supervised, "Envoy")))
        for count in range(1, 6):
            watcher.look()
            assert len(started) == count, "at once, each time"
            end(started[-1])


def test_status_says_what_is_missing_and_what_follows(supervised: Supervised) -> None:
    state = supervised.state
    assert supervised.report() == []
    pids = {role: run(supervised, role) for role in ROLES}
    state.save_serving(Serving())
    assert [(one.name, one.running, one.problem) for one in supervised.report()] == [(role, True, "") for role in ROLES]

    state.save(ServerRecord(pids["TorchServe"], Addresses()))
    end(pids["TorchServe"])
    with pytest.raises(ServerError, match=r"TorchServe \(pid \d+\) has ended; the keeper starts it again\."):
        running(state)
    end(pids["keeper"])
    assert "the watcher starts the keeper again, which starts it" in supervised.problem("TorchServe")
    assert "the watcher starts it again" in supervised.problem("keeper")
    end(pids["watcher"])
    for role in ("TorchServe", "keeper", "watcher"):
        assert "torchserve-dag up starts what is missing" in supervised.problem(role)
    assert not supervised.problem("Envoy")

    state.save_serving(Serving(front_door=False))
    assert "Envoy" not in {one.name for one in supervised.report()}


def test_up_refuses_what_is_whole_and_adds_what_is_missing(supervised: Supervised) -> None:
    state = supervised.state
    pids = {role: run(supervised, role) for role in ROLES}
    assert not stack.runs(state), "nothing is to be served: these are left over from a start that failed"
    state.save_serving(Serving())
    assert stack.runs(state)
    with pytest.raises(ServerError, match="running already"):
        supervise.check_mendable(state, foreground=False)
    supervise.check_mendable(state, foreground=True)  # it takes over from the watcher
    end(pids["Envoy"])
    supervise.check_mendable(state, foreground=False)
    for role in ("watcher", "keeper", "gateway", "TorchServe"):
        end(pids[role])
    assert not stack.runs(state)


@pytest.mark.parametrize("left", [("Envoy",), ("gateway",), ("TorchServe",), ("Envoy", "TorchServe"), ()])
def test_down_ends_whatever_runs_without_a_keeper(
    supervised: Supervised, left: tuple[Role, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(envoy, "END_S", 0.5)  # which the process in Envoy's place does not use: it has to be killed
    state = supervised.state
    state.save_serving(Serving())
    for role in left:
        pid = run(supervised, role, ignores_sigterm=True)  # as Envoy and Java do
        if role == "TorchServe":
            state.save(ServerRecord(pid, Addresses()))

    assert stack.stop(state.folder.parent) is bool(left)
    assert processes.family(state) == []
    assert supervised.report() == []
    assert stack.stop(state.folder.parent) is False


class TestRealWatchers:
    """The real watcher and the real keeper, with nothing to look after but each other (and no front door)."""

    @pytest.fixture
    def pair(self, supervised: Supervised) -> Iterator[Supervised]:
        state = supervised.state
        java = run(supervised, "TorchServe", ignores_sigterm=True)
        state.save(ServerRecord(java, Addresses()))
        state.save_serving(Serving(front_door=False))
        supervise.start(state)
        supervise.wait_until_whole(state, WITHIN_S)
        yield supervised
        state.forget_serving()

    @pytest.mark.parametrize("role", ["keeper", "watcher"])
    def test_each_starts_the_other_again(self, pair: Supervised, role: Role) -> None:
        before = {one.name: one.pid for one in pair.report()}
        end(before[role])
        wait_for(lambda: (found := pair.process(role)) and found.pid != before[role])
        wait_for(lambda: not any(one.problem for one in pair.report()))

        after = {one.name: one.pid for one in pair.report()}
        assert {name for name in before if before[name] != after[name]} == {role}

    def test_a_new_keeper_continues_what_an_earlier_one_left_stopped(self, pair: Supervised) -> None:
        """While a version loads, the keeper stops its workers now and then, and may be killed just then."""
        worker = psutil.Process(processes.spawn(SLEEP, pair.state))
        worker.suspend()
        wait_for(lambda: worker.status() == psutil.STATUS_STOPPED)
        keeper = pair.process("keeper")
        assert keeper
        end(keeper.pid)

        wait_for(lambda: worker.status() != psutil.STATUS_STOPPED)

    def test_a_new_keeper_begins_a_start_anew_that_an_earlier_one_did_not_finish(self, pair: Supervised) -> None:
        """Else the front door would stay closed for ever."""
        java, keeper = pair.process("TorchServe"), pair.process("keeper")
        assert java
        assert keeper
        pair.note("TorchServe", "loads its models")
        end(keeper.pid)

        wait_for(lambda: not processes.alive(java))
        wait_for(lambda: "the keeper starts it again" in pair.problem("TorchServe"))

    def test_a_sigterm_to_all_of_them_at_once_ends_all(self, pair: Supervised) -> None:
        everybody = processes.family(pair.state)
        for process in everybody:
            process.terminate()

        assert processes.wait(everybody, WITHIN_S) == []
        assert pair.state.serving() is None
        assert pair.state.record() is None

    def test_the_watcher_alone_has_all_ended_while_the_keeper_is_dead(self, pair: Supervised) -> None:
        keeper, watcher = pair.process("keeper"), pair.process("watcher")
        assert keeper
        assert watcher
        watcher.suspend()  # so that it does not start the keeper before it is told to end
        end(keeper.pid)
        watcher.terminate()
        watcher.resume()

        wait_for(lambda: processes.family(pair.state) == [])

    def test_the_foreground_takes_over_from_a_watcher_and_down_ends_it(self, pair: Supervised) -> None:
        state = pair.state
        before = {one.name: one.pid for one in pair.report()}
        log = state.folder / "foreground.log"
        code = "import sys; from pathlib import Path; from torchserve_dag.server.state import State; "
        code += "from torchserve_dag.stack import supervise; supervise.become_watcher(State(Path(sys.argv[1])))"
        with log.open("wb") as out:
            foreground = subprocess.Popen([sys.executable, "-c", code, str(state.folder.parent)], stdout=out)
        wait_for(lambda: (found := pair.process("watcher")) and found.pid == foreground.pid)
        wait_for(lambda: not any(one.problem for one in pair.report()))
        assert {one.name: one.pid for one in pair.report()} == {**before, "watcher": foreground.pid}
        with pytest.raises(ServerError, match="running already"):
            supervise.check_mendable(state, foreground=True)

        assert stack.stop(state.folder.parent) is True
        assert foreground.wait(WITHIN_S) == 0
        assert processes.family(state) == []
        assert "takes over" in log.read_text()
