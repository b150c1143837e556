"""What Triton's Python backend runs: one stage of a work, or all of it, as its model's configuration says."""

from __future__ import annotations

import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

sys.path.append(os.environ["PYTHONPATH"])  # the Python inside the backend does not look there by itself

import works


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        said = {key: value["string_value"] for key, value in json.loads(args["model_config"])["parameters"].items()}
        work = works.work(Path(said["workflow"]))
        if work.computes:
            works.use_threads(1)
        place, self.last = int(said["stage"]), said["last"] == "yes"
        self.first = place <= 0
        self.step = work.load() if place < 0 else work.stages[place].load()

    def execute(self, requests: list[Any]) -> list[Any]:
        sent = [triton.get_input_tensor_by_name(one, "TAKES").as_numpy().reshape(-1)[0] for one in requests]
        answers = self.step(sent if self.first else [pickle.loads(one) for one in sent])  # noqa: S301 (our own)
        return [self._response(answer if self.last else pickle.dumps(answer)) for answer in answers]

    def _response(self, answer: bytes) -> Any:
        value = np.array([[answer]], dtype=np.object_)  # [batch, 1]
        return triton.InferenceResponse([triton.Tensor("GIVES", value)])
