"""Users who send photos over gRPC, each as soon as the last is answered, with locust's own statistics.

locust --config loadtests/locust.conf -f loadtests/grpc_users.py
"""

from __future__ import annotations

import time

import grpc.experimental.gevent
from locust import User, constant, task

from photos import STATE, WORKFLOW, any_photo

# locust runs its users as greenlets: without this, gRPC's own threads would block them all.
grpc.experimental.gevent.init_gevent()

from torchserve_dag.clients import ServingError  # noqa: E402 (after gRPC was told of gevent)
from torchserve_dag.server.connect import host_client as client  # noqa: E402


class GrpcUser(User):
    wait_time = constant(0)

    def on_start(self) -> None:
        self.serving = client(STATE, "grpc")

    def on_stop(self) -> None:
        self.serving.close()

    @task
    def photo(self) -> None:
        objects, body = any_photo()
        begin, error, size = time.perf_counter(), None, 0
        try:
            answer = self.serving.predict(WORKFLOW, body, timeout=60)
            size = len(str(answer))
            if not answer.get("summary"):
                error = ValueError("an answer without a summary")
        except ServingError as failed:
            error = failed
        self.environment.events.request.fire(
            request_type="gRPC",
            name=f"{objects} objects",
            response_time=(time.perf_counter() - begin) * 1000,
            response_length=size,
            exception=error,
            context={},
        )
