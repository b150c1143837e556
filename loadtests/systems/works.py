"""The works in plain Python: what every system runs, with no server and without an engine."""

from __future__ import annotations

import fcntl
import functools
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STUB_BATCH = 32
"""The most items that one call of a stub model takes; `run.batch` of its handler's file."""

Step = Callable[[list[Any]], list[Any]]
"""A batch of values in, a batch out, in order."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of a work that may run in a process of its own. The values between stages can be pickled."""

    name: str
    load: Callable[[], Step]
    """Load it here, warm. The first stage's step takes bodies, the last one's gives answers, both as bytes."""


@dataclass(frozen=True, slots=True)
class Work:
    name: str
    stages: list[Stage]
    example: bytes
    """A body that it answers."""
    computes: bool
    """Whether it keeps a core busy; else a device works, or nothing."""

    def load(self) -> Step:
        """All of it, in this process."""
        return functools.reduce(_then, [stage.load() for stage in self.stages])


def work(workflow: Path) -> Work:
    """The work that a workflow's file describes."""
    name, _, length = workflow.stem.partition("_")
    if name == "chain":
        stages = [Stage(f"step_{number}", lambda: list) for number in range(1, int(length) + 1)]
        return Work(workflow.stem, stages, b"a body", computes=False)
    if workflow.stem == "stub":
        stages = [Stage("detect", lambda: _stub_detect), Stage("classify", lambda: _stub_classify)]
        return Work("stub", stages, b'{"objects": 2}', computes=False)
    if workflow.stem == "detect_classify":
        stages = [Stage("detect", _photo_detector), Stage("classify", _photo_classifier)]
        return Work("detect_classify", stages, (ROOT / "photos/coffee.jpg").read_bytes(), computes=True)
    raise SystemExit(f"{workflow} is not one of the works: detect_classify, stub, chain_N")


def use_threads(count: int) -> None:
    """Let torch use `count` threads of its own in this process. Call it before a stage is loaded."""
    import torch  # noqa: PLC0415 (most works do without it)

    torch.set_num_threads(count)


def _then(first: Step, second: Step) -> Step:
    return lambda values: second(first(values))


def _stub_detect(bodies: list[bytes]) -> list[int]:
    wanted = [json.loads(body)["objects"] for body in bodies]
    return _in_chunks(_on_the_device, wanted, STUB_BATCH)


def _stub_classify(counts: list[int]) -> list[bytes]:
    objects = [number for count in counts for number in range(count)]
    names = iter([f"object {number}" for number in _in_chunks(_on_the_device, objects, STUB_BATCH)])
    labels = ([next(names) for _ in range(count)] for count in counts)
    return [json.dumps({"objects": len(one), "labels": one}).encode() for one in labels]


def _on_the_device(items: list[Any]) -> list[Any]:
    """As long as a stub model takes: one batch at a time, on the whole machine."""
    with (Path(tempfile.gettempdir()) / "stub-device.lock").open("w") as device:
        fcntl.flock(device, fcntl.LOCK_EX)  # until the file is closed
        time.sleep(0.004 + 0.0001 * len(items))
    return items


def _photo_detector() -> Step:
    from torchserve_dag import Photo  # noqa: PLC0415
    from torchserve_dag.runtime.data import codec  # noqa: PLC0415 (it brings torch)

    detect = _handler("yolo_detector")

    def step(bodies: list[bytes]) -> list[Any]:
        photos = [codec.decode(Photo, body) for body in bodies]
        return list(zip(photos, detect(photos), strict=True))

    return step


def _photo_classifier() -> Step:
    from torchserve_dag.runtime.data import codec  # noqa: PLC0415 (as above)
    from torchserve_dag.runtime.project.folders import Project  # noqa: PLC0415

    classify = _handler("image_classifier")
    functions = Project(ROOT).module(ROOT / "workflows/detect_classify.py")

    def step(detected: list[Any]) -> list[bytes]:
        crops = [functions.crop(photo, one) for photo, found in detected for one in found.objects]
        names = iter(classify(crops))
        return [
            codec.encode(functions.describe(found, [next(names) for _ in found.objects]))[0] for _, found in detected
        ]

    return step


def _handler(name: str) -> Step:
    """A handler of this project, in batches of the size that its own file says."""
    from torchserve_dag import Failure  # noqa: PLC0415 (as above)
    from torchserve_dag.runtime.models.load import load_handler  # noqa: PLC0415
    from torchserve_dag.runtime.project.folders import Project  # noqa: PLC0415

    project = Project(ROOT)
    file = project.handler(name)
    stages = load_handler(project, file)

    def step(items: list[Any]) -> list[Any]:
        answers = _in_chunks(stages, items, file.value.run.batch)
        for answer in answers:
            if isinstance(answer, Failure):
                raise ValueError(answer.message)  # noqa: TRY004 (a value, not a wrong type)
        return answers

    return step


def _in_chunks(step: Step, items: list[Any], size: int) -> list[Any]:
    chunks: Iterable[list[Any]] = (items[i : i + size] for i in range(0, len(items), size))
    return [answer for chunk in chunks for answer in step(chunk)]
