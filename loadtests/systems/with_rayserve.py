# /// script
# dependencies = ["ray[serve]==2.60.0"]
# [tool.bench]
# name = "Ray Serve"
# arrangement = """\
# Photos: one deployment, 2 replicas x 1 thread; stub: a deployment a model with batches of 32 that wait 1 ms, \
# behind an ingress; chains: a deployment a step; RAY_SERVE_THROUGHPUT_OPTIMIZED is set \
# (docs.ray.io/en/latest/serve/model_composition.html, advanced-guides/dyn-req-batch.html and performance.html)."""
# ///
"""Ray Serve: each stage a deployment behind an ingress, or the whole work in two replicas."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}

import contract
import ray
import works
from ray import serve as ray_serve
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response

MANY = 256
"""Requests that may be inside a deployment at once."""


class Whole:
    """Bodies in, answers out, one at a time."""

    def __init__(self, workflow: Path) -> None:
        works.use_threads(1)
        self.step = works.work(workflow).load()

    async def __call__(self, request: Request) -> Response:
        (answer,) = await asyncio.to_thread(self.step, [await request.body()])
        return Response(answer)


class Part:
    """One stage, a value at a time."""

    def __init__(self, workflow: Path, place: int) -> None:
        self.step = works.work(workflow).stages[place].load()

    async def __call__(self, value: Any) -> Any:
        return self.step([value])[0]


class BatchedPart(Part):
    """One stage, the values of many requests together."""

    @ray_serve.batch(max_batch_size=works.STUB_BATCH, batch_wait_timeout_s=0.001)
    async def together(self, values: list[Any]) -> list[Any]:
        return await asyncio.to_thread(self.step, values)

    async def __call__(self, value: Any) -> Any:
        return await self.together(value)


class Ingress:
    """Hands each stage what the one before will give."""

    def __init__(self, *stages: DeploymentHandle) -> None:
        self.stages = stages

    async def __call__(self, request: Request) -> Response:
        value: Any = await request.body()
        for stage in self.stages:
            value = stage.remote(value)
        return Response(await value)


def serve(workflow: Path, port: int) -> None:
    ray.init(include_dashboard=False, _temp_dir=os.environ["TMPDIR"], _node_ip_address="127.0.0.1", log_to_driver=True)
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    work = works.work(workflow)
    each = {"ray_actor_options": {"num_cpus": 0}}
    if work.computes:
        application = ray_serve.deployment(Whole, num_replicas=2, max_ongoing_requests=2, **each).bind(workflow)
    else:
        kind = BatchedPart if work.name == "stub" else Part
        stages = [
            ray_serve.deployment(kind, name=stage.name, max_ongoing_requests=MANY, **each).bind(workflow, place)
            for place, stage in enumerate(work.stages)
        ]
        application = ray_serve.deployment(Ingress, max_ongoing_requests=MANY, **each).bind(*stages)
    ray_serve.run(application)
    threading.Event().wait()


if __name__ == "__main__":
    contract.main(serve, "/")
