"""The bodies of a workload as files in one folder, copied or generated."""

from __future__ import annotations

import json
from pathlib import Path

from torchserve_dag.bench.benchmark_file import Workload
from torchserve_dag.bench.errors import BenchError


def prepare(work: Workload, base: Path, below: Path) -> list[Path]:
    """Write the bodies into a folder `below`; the order of their names is the order of sending. Returns the paths.

    `base` is the plan's folder. Raises BenchError if a file of the work is missing.
    """
    folder = below / work.slug
    folder.mkdir(parents=True, exist_ok=True)
    contents: dict[str, bytes] = {}
    for i, name in enumerate(work.bodies):
        try:
            contents[f"{i:03}-{Path(name).name}"] = (base / name).read_bytes()
        except OSError:
            raise BenchError(f'{base / name}, a body of the workload "{work.name}", does not exist.') from None
    if work.bytes is not None:
        contents["body.bin"] = b"x" * work.bytes
    contents |= {f"{i:03}.json": json.dumps({"objects": count}).encode() for i, count in enumerate(work.mix)}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]
