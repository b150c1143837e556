"""The bare loop: a workflow's models and functions in a loop, without any server: the baseline of the other systems."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.bench.benchmark_file import Arrangement, number
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.systems import last_line
from torchserve_dag.runtime.data import plain

_START_S = 180.0


@dataclass(frozen=True, slots=True)
class BareLoopResult:
    """The measurements that the loop prints."""

    requests: int
    seconds: float
    latencies_ms: list[float]
    memory_mb: float
    startup_s: float


def run(
    command: list[str], workflow: Path, bodies: Path, arrangement: Arrangement, seconds: float, log: Path
) -> BareLoopResult:
    """Measure one arrangement; `command` is the Python and the program. Raises BenchError."""
    options = {
        "--bodies": bodies,
        "--seconds": seconds,
        "--processes": number(arrangement.processes),
        "--threads": number(arrangement.threads),
        "--batch": arrangement.batch,
    }
    words = [*command, str(workflow), *(str(word) for option in options.items() for word in option)]
    with log.open("ab") as errors, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(  # noqa: S603 (a program of the plan)
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
        )
        try:
            status = process.wait(_START_S + 2 * seconds)
        except subprocess.TimeoutExpired:
            raise BenchError(f"the bare loop does not end; see {log}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().splitlines()
    if status or not lines:
        raise BenchError(f"the bare loop failed: {last_line(log)}")
    try:
        return plain.build(BareLoopResult, json.loads(lines[-1]))
    except (ValueError, plain.WrongDataError) as error:
        raise BenchError(f"the output of the bare loop is wrong: {error}") from None
