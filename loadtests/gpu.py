"""The workflow's throughput on a GPU, in one process: the engine beside a bare loop, at growing batch sizes.

    python loadtests/gpu.py                          cuda:0, batches 1 to 64; writes loadtests/results/gpu.{json,md}
    python loadtests/gpu.py --device cpu --batches 1,2 --photos 20

For each batch size: photos a second of the bare loop (plain Python, the same handlers, whole batches of photos), and
of the engine, which gets single requests and batches them itself; with batches of one it does not batch across
requests. Then, for each photo, how often the host waited for the GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from torchserve_dag.runtime.data import codec
from torchserve_dag.runtime.messages import Failure, Photo
from torchserve_dag.runtime.models.load import load_handler
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.workflow import Workflow

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ("empty", "coffee", "chelsea", "five")
OBJECTS = 4
"""The classifier's batch size, for each photo in the detector's batch."""
ROUNDS = 3
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True)
class Row:
    batch: int
    bare: float
    """Photos per second; likewise below."""
    engine: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--photos", type=int, default=640, help="in each measurement")
    options = parser.parse_args()
    bodies = [(ROOT / "photos" / f"{name}.jpg").read_bytes() for name in PHOTOS]
    bodies = (bodies * (options.photos // len(bodies) + 1))[: options.photos]
    rows = []
    for batch in map(int, options.batches.split(",")):
        bare = bare_loop(options.device, batch)
        with engine(options.device, batch) as workflow:
            rows.append(Row(batch, rate(bare, bodies, options.device), rate(workflow, bodies, options.device)))
    waits = host_waits(options.device, rows[-1].batch, bodies)
    report(rows, waits, options.device)


def bare_loop(device: str, batch: int) -> Callable[[list[bytes]], Any]:
    """Decode, detect, crop, classify: whole batches, one after another, in one thread."""
    project = Project(ROOT)
    detect, classify = (
        load_handler(project, project.handler(name), device=device, batch=size)
        for name, size in (("yolo_detector", batch), ("image_classifier", OBJECTS * batch))
    )
    functions = project.module(ROOT / "workflows" / "detect_classify.py")

    def run(bodies: list[bytes]) -> None:
        for start in range(0, len(bodies), batch):
            photos = [codec.decode(Photo, body) for body in bodies[start : start + batch]]
            found = detect(photos)
            pairs = zip(photos, found, strict=True)
            crops = [functions.crop(photo, one) for photo, objects in pairs for one in objects.objects]
            for first in range(0, len(crops), OBJECTS * batch):
                classify(crops[first : first + OBJECTS * batch])

    return run


def engine(device: str, batch: int) -> Workflow:
    """The demo's workflow with these batches."""
    text = (ROOT / "workflows" / "detect_classify.yaml").read_text("utf-8")
    text = text.replace("handler: yolo_detector", f"handler: yolo_detector, batch: {batch}")
    text = text.replace("handler: image_classifier", f"handler: image_classifier, batch: {OBJECTS * batch}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "workflows").mkdir()
        (root / "workflows" / "detect_classify.yaml").write_text(text)
        (root / "workflows" / "detect_classify.py").symlink_to(ROOT / "workflows" / "detect_classify.py")
        for name in ("handlers", "weights"):
            (root / name).symlink_to(ROOT / name)
        return Workflow.load(root / "workflows" / "detect_classify.yaml", device=device)


def rate(run: Callable[[list[bytes]], Any], bodies: list[bytes], device: str) -> float:
    """Photos a second: the median of ROUNDS, after one to warm up."""
    run(bodies[: len(bodies) // 4])
    rates = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        answers = run(bodies)
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(len(bodies) / (time.perf_counter() - begin))
        if answers and any(isinstance(answer, Failure) for answer in answers):
            raise SystemExit("a request failed")
    return statistics.median(rates)


def host_waits(device: str, batch: int, bodies: list[bytes]) -> float | None:
    """How often the host waited for the GPU, per photo; None on a CPU."""
    if device == "cpu":
        return None
    with engine(device, batch) as workflow:
        workflow(bodies[: 2 * batch])
        with torch.profiler.profile() as profile:
            workflow(bodies)
    waits = sum(event.count for event in profile.key_averages() if event.key in WAITS)
    return waits / len(bodies)


def report(rows: list[Row], waits: float | None, device: str) -> None:
    name = platform.processor() or "CPU" if device == "cpu" else torch.cuda.get_device_name(device)
    best, single = max(rows, key=lambda row: row.engine), rows[0]
    table = Table("batch", "bare loop", "engine", "ratio", title=f"photos a second, {name}, torch {torch.__version__}")
    for row in rows:
        table.add_row(str(row.batch), f"{row.bare:.1f}", f"{row.engine:.1f}", f"{row.engine / row.bare:.2f}")
    console = Console()
    console.print(table)
    fastest = max(row.bare for row in rows)
    sentence = (
        f"The engine at its best is {best.engine / fastest:.2f} of the bare loop at its best, and "
        f"{best.engine / single.engine:.1f} times itself with batches of {single.batch}."
    )
    if waits is not None:
        sentence += f" The host waited for the GPU {waits:.2f} times for each photo."
    console.print(sentence)
    out = ROOT / "loadtests" / "results"
    out.mkdir(exist_ok=True)
    (out / "gpu.json").write_text(json.dumps({"device": name, "rows": [vars(row) for row in rows], "waits": waits}))
    lines = [f"| {row.batch} | {row.bare:.1f} | {row.engine:.1f} | {row.engine / row.bare:.2f} |" for row in rows]
    head = ["| batch | bare loop | engine | ratio |", "|---|---|---|---|"]
    (out / "gpu.md").write_text("\n".join([*head, *lines, "", sentence, ""]))


if __name__ == "__main__":
    main()
