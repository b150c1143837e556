# /// script
# dependencies = ["bentoml==1.4.40"]
# [tool.bench]
# name = "BentoML"
# arrangement = """\
# Photos: one service, 2 workers x 1 thread, without batches; stub: a service a model with adaptive batches of 32, \
# and one in front (docs.bentoml.com/en/latest/get-started/adaptive-batching.html); chains: one service. Bodies \
# come in raw, through an ASGI app."""
# ///
"""BentoML: each stage a service with adaptive batches behind one that is asked, or the whole work in its workers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import anyio
import bentoml
import contract
import works
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

WORKFLOW = "BENCH_WORKFLOW"
"""Where the services, in processes of their own, find which workflow is served."""
FOREVER = {"max_requests": 1_000_000_000, "max_age": 1e9}
"""How long a connection from service to service is kept. With the default every hundredth request closes it, and
whatever else is under way on it fails."""


async def _answer(request: Request) -> Response:
    return Response(await bentoml.get_current_service().answer(await request.body()))


_raw = Starlette()
_raw.add_route("/answer", _answer, methods=["POST"])


def _whole(work: works.Work) -> Any:
    @bentoml.asgi_app(_raw)
    @bentoml.service(name="whole", workers=2 if work.computes else 1, traffic={"timeout": 60})
    class Whole:
        def __init__(self) -> None:
            if work.computes:
                works.use_threads(1)
            self.step = work.load()
            self.one = anyio.CapacityLimiter(1)

        async def answer(self, body: bytes) -> bytes:
            if work.computes:
                return (await anyio.to_thread.run_sync(self.step, [body], limiter=self.one))[0]
            return self.step([body])[0]

    return Whole


def _stages(work: works.Work) -> Any:
    first, second = (_stage(stage) for stage in work.stages)

    @bentoml.asgi_app(_raw)
    @bentoml.service(name="stages", traffic={"timeout": 60}, runner_connection=FOREVER)
    class Stages:
        detect = bentoml.depends(first)
        classify = bentoml.depends(second)

        async def answer(self, body: bytes) -> bytes:
            (found,) = await self.detect.to_async.run([body])
            (answer,) = await self.classify.to_async.run([found])
            return answer

    return Stages


def _stage(stage: works.Stage) -> Any:
    @bentoml.service(name=stage.name, traffic={"timeout": 60}, runner_connection=FOREVER)
    class Stage:
        def __init__(self) -> None:
            self.step = stage.load()

        @bentoml.api(batchable=True, max_batch_size=works.STUB_BATCH, max_latency_ms=60_000)
        def run(self, values: list[Any]) -> list[Any]:
            return self.step(values)

    return Stage


if WORKFLOW in os.environ:
    _work = works.work(Path(os.environ[WORKFLOW]))
    Served = _stages(_work) if _work.name == "stub" else _whole(_work)


def serve(workflow: Path, port: int) -> None:
    os.environ |= {WORKFLOW: str(workflow), "BENTOML_HOME": os.environ["TMPDIR"], "BENTOML_DO_NOT_TRACK": "true"}
    command = [sys.executable, "-m", "bentoml", "serve", "with_bentoml:Served"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [*command, "--working-dir", str(Path(__file__).parent)])  # noqa: S606 (our own arguments)


if __name__ == "__main__":
    contract.main(serve, "/answer", metrics="/metrics")
