"""Users who send photos over REST, each as soon as the last is answered.

locust --config loadtests/locust.conf -f loadtests/rest.py
"""

from __future__ import annotations

from locust import FastHttpUser, constant, task

from photos import STATE, WORKFLOW, any_photo
from torchserve_dag.clients import KeyFile
from torchserve_dag.server.connect import running

TOKEN = KeyFile.read(STATE.key_file).inference


class RestUser(FastHttpUser):
    wait_time = constant(0)
    host = running(STATE).addresses.inference
    # A user that waits longer than the workflow's own time limit would only hide it.
    network_timeout = connection_timeout = 60.0

    @task
    def photo(self) -> None:
        objects, body = any_photo()
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/jpeg"}
        with self.client.post(
            f"/predictions/{WORKFLOW}", body, headers=headers, name=f"{objects} objects", catch_response=True
        ) as response:
            if response.status_code == 200 and not response.json().get("summary"):  # noqa: PLR2004
                response.failure("an answer without a summary")
