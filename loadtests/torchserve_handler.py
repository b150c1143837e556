"""What it costs to run an unedited TorchServe handler as a node: against TorchServe's own worker, without a server.

    python loadtests/torchserve_handler.py [PHOTO]

Both get the same photo, in this process's place as their server: TorchServe's worker as bytes over its socket, the node
as bytes of a request. A handler decodes the photo, and takes the mean of its pixels.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from torchserve_dag.runtime.compat.wire import WireReader, WireRequest, read_response_heads, write_requests
from torchserve_dag.runtime.workflow import Workflow

HANDLER = """
    import io
    import torch
    from PIL import Image, ImageStat

    def handle(data, context):
        if data is None:
            return None
        images = [Image.open(io.BytesIO(row.get("data") or row.get("body"))).convert("RGB") for row in data]
        pixels = torch.tensor([ImageStat.Stat(image.resize((224, 224))).mean for image in images])
        return pixels.mean(dim=1).tolist()
"""
WORKFLOW = """
    name: flow
    version: "1.0"
    does: The mean of a photo's pixels.
    nodes:
      mean: {torchserve: {archive: mean.mar, takes: Photo, gives: float}, batch: 8}
    output: mean
"""
CROPPED = WORKFLOW.replace("mean: {", "cut: {function: cut}\n      mean: {input: cut, ")
FUNCTIONS = """
    from torchserve_dag import Box, Photo

    def cut(photo: Photo) -> Photo:
        return photo.crop(Box(0, 0, photo.width - 1, photo.height))
"""
ROUNDS, LONE, TOGETHER = 3, 30, 64

Ask = Callable[[int], None]
"""Has so many requests answered, all sent together."""


def project() -> Path:
    root = Path(tempfile.mkdtemp())
    (root / "workflows").mkdir()
    (root / "model_store").mkdir()
    with zipfile.ZipFile(root / "model_store" / "mean.mar", "w") as archive:
        manifest = {"runtime": "python", "model": {"modelName": "mean", "handler": "handler.py"}}
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        archive.writestr("handler.py", textwrap.dedent(HANDLER))
    for name, text in (("flow.yaml", WORKFLOW), ("cropped.yaml", CROPPED.replace("name: flow", "name: cropped"))):
        (root / "workflows" / name).write_text(textwrap.dedent(text))
    (root / "workflows" / "cropped.py").write_text(textwrap.dedent(FUNCTIONS))
    return root


@contextmanager
def worker(root: Path, photo: bytes) -> Iterator[Ask]:
    """TorchServe's own worker, with batches of 8."""
    folder = root / "alone"
    with zipfile.ZipFile(root / "model_store" / "mean.mar") as archive:
        archive.extractall(folder)
    ts = Path(str(find_spec("ts").origin)).parent  # type: ignore[union-attr]
    address = str(root / "worker.9000")
    command = [sys.executable, str(ts / "model_service_worker.py"), "--sock-type", "unix", "--sock-name", address]
    command += ["--metrics-config", str(ts / "configs" / "metrics.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    program = subprocess.Popen(  # noqa: S603
        command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    connection = socket.socket(socket.AF_UNIX)
    while not Path(address).exists():
        time.sleep(0.1)
    time.sleep(0.2)
    connection.connect(address)

    def text(value: str) -> bytes:
        return len(value).to_bytes(4, "big") + value.encode()

    load = b"L" + text("mean") + text(str(folder)) + (8).to_bytes(4, "big") + text("handler.py") + b"\xff" * 4
    connection.sendall(load + text("") + b"\1")
    reader = WireReader(read_response_heads)

    def answered() -> None:
        while not any(True for _ in reader.feed(connection.recv(1 << 18))):
            pass

    def ask(requests: int) -> None:
        for first in range(0, requests, 8):
            batch = [WireRequest(str(i), {"body": photo}, {}) for i in range(first, min(requests, first + 8))]
            connection.sendall(write_requests(batch))
            answered()

    answered()
    try:
        yield ask
    finally:
        connection.close()
        program.wait()


def measured(ask: Ask) -> tuple[float, float]:
    """The median time of a lone request in ms, and requests per second together."""
    times = []
    for _ in range(LONE):
        began = time.perf_counter()
        ask(1)
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    ask(TOGETHER)
    return statistics.median(times) * 1000, TOGETHER / (time.perf_counter() - began)


def main() -> None:
    photo = Path(sys.argv[1] if len(sys.argv) > 1 else "photos/coffee.jpg").read_bytes()
    root = project()
    with (
        worker(root, photo) as alone,
        Workflow.load(root / "workflows" / "flow.yaml") as node,
        Workflow.load(root / "workflows" / "cropped.yaml") as cropped,
    ):
        arrangements: dict[str, Ask] = {
            "TorchServe's worker": alone,
            "a node": lambda requests: node([photo] * requests) and None,
            "a node, of a crop": lambda requests: cropped([photo] * requests) and None,
        }
        for ask in arrangements.values():
            ask(8)
        found = {name: [measured(ask) for _ in range(ROUNDS)] for name, ask in arrangements.items()}
    for name, rounds in found.items():
        lone, rate = (sorted(one)[ROUNDS // 2] for one in zip(*rounds, strict=True))
        print(f"{name:22} {lone:6.1f} ms   {rate:6.1f} requests/s")  # noqa: T201


if __name__ == "__main__":
    main()
