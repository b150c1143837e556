# /// script
# dependencies = ["litserve==0.2.19"]
# [tool.bench]
# name = "LitServe"
# arrangement = """\
# Photos: 2 workers x 1 thread, batches of 8; stub: 2 workers, batches of 32, so that one forms while the other is \
# on the device; chains: 1 worker without batches; a batch waits 1 ms, queues are ZeroMQ's \
# (lightning.ai/docs/litserve/features/batching, and fast_queue of its API reference)."""
# ///
"""LitServe: the whole work in each worker."""

from pathlib import Path
from typing import Annotated, Any

import contract
import litserve
import works
from fastapi import Depends, Request, Response


# LitServe hands the annotation of `decode_request` to FastAPI as it stands, so annotations are no strings in this file.
async def _body(request: Request) -> bytes:
    return await request.body()


class Api(litserve.LitAPI):
    def __init__(self, workflow: Path, **batches: Any) -> None:
        super().__init__(**batches)
        self.workflow = workflow

    def setup(self, device: str) -> None:  # noqa: ARG002 (LitServe's)
        work = works.work(self.workflow)
        if work.computes:
            works.use_threads(1)
        self.step = work.load()

    def decode_request(self, request: Annotated[bytes, Depends(_body)]) -> bytes:
        return request

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: Any) -> Any:
        return self.step(x) if isinstance(x, list) else self.step([x])[0]

    def unbatch(self, output: list[bytes]) -> list[bytes]:
        return output

    def encode_response(self, output: bytes) -> Response:
        return Response(output)


def serve(workflow: Path, port: int) -> None:
    work = works.work(workflow)
    if work.computes:
        api, workers = Api(workflow, max_batch_size=8, batch_timeout=0.001), 2
    elif work.name == "stub":
        api, workers = Api(workflow, max_batch_size=32, batch_timeout=0.001), 2
    else:
        api, workers = Api(workflow), 1
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=workers, timeout=60, fast_queue=True)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    contract.main(serve, "/predict")
