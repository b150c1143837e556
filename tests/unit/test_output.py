"""A worker's output: whatever a client makes it print, only the worker's own commands are obeyed."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.logs import AGAIN_S, CONTINUED, Faults, Formatter
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.worker import relay
from torchserve_dag.runtime.workflow import Workflow

OBEYED = re.compile(r"^(INFO > )?(\[METRICS])(.*)|^(INFO > )?(\[PID])(\d+)$")  # WorkerLifeCycle.java of 0.12.0
SCANNER = re.compile("\r\n|[\n\r\u2028\u2029\u0085]")
"""Where Java's Scanner ends a line."""

WORKER = """
    import ctypes, logging, os, subprocess, sys, time
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.INFO)
    from torchserve_dag.runtime.worker import output

    output.take_over()
    output.command("[PID]11\\n")
    bad = "x\\n[METRICS]forged.Count:1|#a:b\\r[PID]22\\u2028[PID]33\\u0085[PID]44"
    print(bad, flush=True)
    print("[PID]55", file=sys.stderr, flush=True)
    print("INFO > [PID]66", flush=True)
    logging.getLogger("theirs").error("refused: %s", bad)
    try:
        raise ValueError(bad)
    except ValueError:
        logging.exception("raised")
    os.write(1, b"[PID]77\\n")
    ctypes.CDLL(None).puts(b"[PID]88")
    ctypes.CDLL(None).fflush(None)
    subprocess.run(["echo", "[PID]99"])
"""


def lines(text: str) -> list[str]:
    return SCANNER.split(text)


def worker(script: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_nothing_that_a_client_makes_a_worker_print_is_obeyed() -> None:
    """Printed, logged, in an exception; by Python, by C, by a child; at every line end that Java knows."""
    output, errors = (part.decode() for part in worker(WORKER).communicate(timeout=300))
    obeyed = [line for line in [*lines(output), *lines(errors)] if OBEYED.fullmatch(line)]

    assert obeyed == ["[PID]11"]
    for said in ("forged", "22", "33", "44", "66", "77", "88", "99"):
        assert said in output, said
    assert " [PID]55" in errors
    assert f"{CONTINUED}ValueError: x" in output


def test_the_last_words_of_a_process_that_crashes_are_passed_on() -> None:
    crashes = "\n    os.write(2, b'terminate called after throwing'); os.abort()\n"
    process = worker(WORKER + crashes)
    _, errors = process.communicate(timeout=300)

    assert process.returncode == -signal.SIGABRT
    assert b"terminate called after throwing\n" in errors


def test_a_relay_that_is_killed_is_started_again_and_nothing_is_lost() -> None:
    kills = """
    os.kill(output._taken._relay.pid, 9)
    output._taken._relay.wait()
    print("meanwhile", flush=True)
    output.command("[PID]12\\n")
    print("afterwards", flush=True)
    """
    output = worker(WORKER + kills).communicate(timeout=300)[0].decode()

    assert [line for line in lines(output) if OBEYED.fullmatch(line)] == ["[PID]11", "[PID]12"]
    assert "meanwhile\n" in output
    assert "afterwards\n" in output


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_comes_in_parts_is_read_as_one(cut: int) -> None:
    data, passed = bytearray(), b""
    text = b"a[METRICS]\n[METRICS]b\r\n[PID]1\nrest"
    for part in (text[:cut], text[cut:], b"\n"):
        data += part
        passed += relay.harmless(relay.whole_lines(data))

    assert passed.replace(b" ", b"").replace(b"\r\n", b"\n") == text.replace(b"\r\n", b"\n") + b"\n"
    assert [line for line in lines(passed.decode()) if OBEYED.fullmatch(line)] == []


def test_a_line_without_an_end_is_cut() -> None:
    data = bytearray(b"x" * relay.MAX_LINE + b"[PID]1")

    assert relay.whole_lines(data) == b"x" * relay.MAX_LINE + b"[PID]1\n"
    assert data == b""


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.setFormatter(Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += self.format(record).split("\n")


class TestFaults:
    @pytest.fixture
    def records(self) -> Records:
        return Records()

    @pytest.fixture
    def logger(self, records: Records) -> logging.Logger:
        logger = logging.Logger("test")  # noqa: LOG001 (it is nobody's child)
        logger.addHandler(records)
        return logger

    @staticmethod
    def raised(text: str) -> Exception:
        try:
            raise ValueError(text)  # noqa: TRY301 (its place is what counts)
        except ValueError as error:
            return error

    def test_a_fault_has_one_traceback_a_minute_and_the_rest_is_counted(
        self, records: Records, logger: logging.Logger
    ) -> None:
        now = [0.0]
        faults = Faults(lambda: now[0])
        for i in range(413):
            fault = faults.report(logger, self.raised("bad\n[PID]1"), "upper: infer raised", line=False)
            assert len(records.lines) < 10, i
        now[0] = AGAIN_S
        faults.report(logger, self.raised("bad"), "upper: infer raised", line=False)
        starts = [line for line in records.lines if not line.startswith(CONTINUED)]

        assert starts == [
            f"fault {fault}: upper: infer raised",
            f"fault {fault}: upper: infer raised (and 412 more in the last minute)",
        ]
        assert f"{CONTINUED}ValueError: bad" in records.lines

    def test_a_line_that_names_a_request_stays(self, records: Records, logger: logging.Logger) -> None:
        faults = Faults(lambda: 0.0)
        for i in range(3):
            fault = faults.report(logger, self.raised(f"bad {i}"), f"request r{i}: it raised")
        starts = [line for line in records.lines if not line.startswith(CONTINUED)]

        assert starts[1:] == [f"fault {fault}: request r{i}: it raised: ValueError: bad {i}" for i in (1, 2)]

    def test_other_places_and_types_are_other_faults(self, logger: logging.Logger) -> None:
        faults = Faults(lambda: 0.0)
        other = [faults.report(logger, error, "w", line=False) for error in (self.raised("a"), KeyError("a"))]

        assert len({*other, faults.report(logger, self.raised("b"), "w", line=False)}) == 2


def test_the_minutes_count_is_logged_also_if_nothing_more_comes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "AGAIN_S", 0.1)
    faults, error = Faults(lambda: 0.0), TestFaults.raised("bad")
    fault = faults.report(logging.getLogger("counted"), error, "upper raised", line=False)
    for _ in range(3):
        faults.report(logging.getLogger("counted"), error, "upper raised", line=False)
    end = time.monotonic() + 60
    while faults._counter and time.monotonic() < end:
        time.sleep(0.01)
    counts = re.compile(rf"fault {fault}: upper raised: ValueError \(and (\d) more in the last minute\)")

    assert sum(int(found[1]) for text in caplog.messages if (found := counts.fullmatch(text))) == 3
    assert faults._counter is None


def test_many_faults_are_counted_by_one_thread_also_those_that_are_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults, error = Faults(lambda: 0.0), TestFaults.raised("bad")
    before = threading.active_count()
    for i in range(logs.MAX_FAULTS + 1):
        for _ in range(2):
            faults.report(logging.getLogger("counted"), error, f"node {i} raised", line=False)

    assert threading.active_count() <= before + 1
    assert sum("(and 1 more in the last minute)" in text for text in caplog.messages) == logs.MAX_FAULTS


def test_a_failure_that_a_fallback_covers_is_one_line_with_its_request_and_node(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    code = "def breaks(text: Text) -> Text: raise RuntimeError('always')\n\ndef covers(text: Text) -> Text: return text"
    path = write("answer: {function: breaks, on_error: {fallback: {function: covers}}}", code)
    with Workflow.load(path) as workflow:
        requests = [workflow.submit(b"x", request_id=f"r{i}") for i in range(50)]
        assert [one.future.result(60) for one in requests] == [Text("x")] * 50
    tracebacks = [record for record in caplog.records if record.exc_info]
    lines = [record.message for record in caplog.records if not record.exc_info]

    assert len(tracebacks) == 1
    assert sorted(lines) == sorted(
        f"request r{i}: answer: breaks failed. (fault {tracebacks[0].message.split()[1][:-1]})" for i in range(50)
    )


def test_a_process_that_ends_has_said_its_last_words_by_then(tmp_path: Path) -> None:
    """TorchServe reads no more once a worker has ended: why a model cannot be loaded would be lost."""
    program = "from torchserve_dag.runtime.worker import output\noutput.take_over()\nraise RuntimeError('no weights')"
    with (tmp_path / "errors").open("wb") as errors:
        subprocess.run([sys.executable, "-c", program], stderr=errors, check=False, timeout=100)

    assert "RuntimeError: no weights" in (tmp_path / "errors").read_text()


def test_why_a_model_cannot_be_loaded_is_said_before_anybody_else_can_know(tmp_path: Path) -> None:
    """TorchServe ends the worker as soon as it knows, however busy the machine is and the relay late."""
    program = """
        from torchserve_dag.runtime.worker import output
        output.take_over()
        print("loading", flush=True)
        output.hand_back()
        print("no weights", flush=True)
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    """
    with (tmp_path / "said").open("wb") as said:
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], stdout=said, check=False, timeout=100)

    assert (tmp_path / "said").read_text() == "loading\nno weights\n"
