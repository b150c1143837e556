"""Calls a server with Triton's client, over REST or gRPC, and prints what it got as JSON.

    .venv-triton/bin/python tests/live/triton_calls.py http|grpc HOST:PORT PHOTO KEY

It runs in the environment of Triton's client, which has nothing of this project.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException


def main(kind: str, address: str, photo: Path, key: str) -> None:
    triton = importlib.import_module(f"tritonclient.{kind}")
    client = triton.InferenceServerClient(address)
    headers = {"authorization": f"Bearer {key}"}

    def infer(model: str, *outputs: str, version: str = "", **inputs: Any) -> dict[str, Any]:
        given = []
        for name, array in inputs.items():
            datatype = "BYTES" if array.dtype == object else np_to_triton(array.dtype)
            given.append(triton.InferInput(name, array.shape, datatype))
            given[-1].set_data_from_numpy(array)
        asked = [triton.InferRequestedOutput(name) for name in outputs] or None
        result = client.infer(model, given, model_version=version, outputs=asked, request_id="42", headers=headers)
        names = outputs or [output["name"] for output in response_of(result)["outputs"]]
        return {name: plain(result.as_numpy(name)) for name in names} | {"id": response_of(result)["id"]}

    def response_of(result: Any) -> Any:
        return result.get_response() if kind == "http" else result.get_response(as_json=True)

    def metadata_of(model: str) -> Any:
        return (
            client.get_model_metadata(model, headers=headers)
            if kind == "http"
            else client.get_model_metadata(model, headers=headers, as_json=True)
        )

    def server_metadata() -> Any:
        if kind == "http":
            return client.get_server_metadata(headers=headers)
        return client.get_server_metadata(headers=headers, as_json=True)

    def refusal(model: str, **inputs: Any) -> list[str]:
        try:
            return [str(infer(model, **inputs))]
        except InferenceServerException as error:
            return [error.status(), error.message()]

    file = photo.read_bytes()
    found = {
        "live": client.is_server_live(headers=headers),
        "ready": client.is_server_ready(headers=headers),
        "model ready": client.is_model_ready("text", "1.0", headers=headers),
        "server": server_metadata()["name"],
        "inputs": [(one["name"], one["datatype"]) for one in metadata_of("seen")["inputs"]],
        "texts": infer("text", input=np.array([b"a", "ü".encode()], object)),
        "version": infer("text", version="1.0", input=np.array([b"a"], object)),
        "photos": infer("size", "output", input=np.array([file, file], object)),
        "numbers": infer("total", input=np.array([[1, 2], [3, 4]], np.float32)),
        "halves": infer("total", input=np.array([[0.5, 2]], np.float16)),
        "labels": infer("scored", input=np.array([b"a b", b"c"], object)),
        "fields": infer(
            "seen",
            "matrix",
            "fast",
            "words",
            matrix=np.array([[[0.5], [1]]]),
            count=np.array([7], np.uint16),
            fast=np.array([True]),
            words=np.array([[b"a", b"b"]], object),
            style=np.array([b"bold"], object),
            note=np.array([b"n"], object),
            about=np.array([b"{}"], object),
        ),
        "bad": refusal("text", input=np.array([b"a", b"bad"], object)),
        "none": refusal("none", input=np.array([b"a"], object)),
        "wrong": refusal("text", input=np.array([1], np.int64)),
    }
    sys.stdout.write(json.dumps(found))


def np_to_triton(kind: Any) -> str:
    return {"b": "BOOL", "i": "INT", "u": "UINT", "f": "FP"}[kind.kind] + (
        str(8 * kind.itemsize) if kind.kind != "b" else ""
    )


def plain(array: Any) -> Any:
    return [each.decode() if isinstance(each, bytes) else each for each in array.ravel().tolist()]


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
