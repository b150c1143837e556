"""What a folder of results was measured with: the plan, the systems, the machine, the day."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag.bench.benchmark_file import BenchmarkFile
from torchserve_dag.bench.errors import BenchError
from torchserve_dag.bench.machine import Machine
from torchserve_dag.bench.programs import Program
from torchserve_dag.runtime.data import plain

_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class BenchmarkRun:
    date: str
    machine: Machine
    plan: BenchmarkFile
    plan_file: str
    programs: list[Program]

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _FILE).write_text(json.dumps(plain.flatten(self), indent=2) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> BenchmarkRun:
        """Raises BenchError if the folder contains no results."""
        try:
            return plain.build(cls, json.loads((folder / _FILE).read_bytes()))
        except OSError:
            raise BenchError(f"{folder} has no {_FILE}: it is not a folder of results.") from None
        except (ValueError, plain.WrongDataError) as error:
            raise BenchError(f"{folder / _FILE} is damaged: {error}.") from None
