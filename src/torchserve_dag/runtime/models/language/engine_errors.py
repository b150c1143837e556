"""Why an answer ended early where the process that computed it was ended, or ended by itself."""

from __future__ import annotations

from http import HTTPStatus

from torchserve_dag.runtime.messages import InputError


class EngineEndedError(InputError):
    """The process ended with an answer in progress."""

    type = "WorkerDied"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.INSUFFICIENT_STORAGE)  # TorchServe's status


class EngineTimeoutError(InputError):
    """The next token did not come in time."""

    type = "Timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, HTTPStatus.GATEWAY_TIMEOUT)
