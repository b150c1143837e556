# /// script
# dependencies = ["nvidia-pytriton==0.7.0"]
# [tool.bench]
# name = "Triton, Python backend"
# arrangement = """\
# Python backend. Photos: one model, 2 instances x 1 thread, without batches; stub: an ensemble of two models with \
# dynamic batches of 32 that wait 1 ms; chains: an ensemble of a model a step \
# (docs.nvidia.com/deeplearning/triton-inference-server, Optimization and Ensemble Models)."""
# ///
"""Triton: each stage a model of its Python backend in an ensemble, or the whole work in two instances of one."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import contract
import pytriton
import works

MODEL = """
name: "{name}" backend: "python" max_batch_size: {batch}
input {{ name: "TAKES" data_type: TYPE_STRING dims: 1 }}
output {{ name: "GIVES" data_type: TYPE_STRING dims: 1 }}
instance_group {{ kind: KIND_CPU count: {instances} }}
{dynamic}
parameters {{ key: "workflow" value: {{ string_value: "{workflow}" }} }}
parameters {{ key: "stage" value: {{ string_value: "{stage}" }} }}
parameters {{ key: "last" value: {{ string_value: "{last}" }} }}
"""
ENSEMBLE = """
name: "work" platform: "ensemble" max_batch_size: {batch}
input {{ name: "TAKES" data_type: TYPE_STRING dims: 1 }}
output {{ name: "GIVES" data_type: TYPE_STRING dims: 1 }}
ensemble_scheduling {{ {steps} }}
"""
STEP = """
step {{ model_name: "{name}" model_version: -1
  input_map {{ key: "TAKES" value: "{takes}" }} output_map {{ key: "GIVES" value: "{gives}" }} }}
"""


def serve(workflow: Path, port: int) -> None:
    folder = Path(os.environ["TMPDIR"])
    program = _installed(folder)
    _repository(workflow, folder / "models")
    grpc, metrics = contract.free_ports(2)
    command = [str(program), f"--model-repository={folder / 'models'}", f"--backend-directory={folder / 'backends'}"]
    command += ["--http-address=127.0.0.1", f"--http-port={port}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"]
    command += ["--metrics-address=127.0.0.1", f"--metrics-port={metrics}", "--exit-timeout-secs=3"]
    os.environ["PATH"] = (
        f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the backend's processes take its Python
    )
    os.execv(program, command)  # noqa: S606 (our own arguments)


def _installed(folder: Path) -> Path:
    """Triton's program. Its Python backend and that backend's program for this Python lie apart."""
    triton = Path(pytriton.__file__).parent / "tritonserver"
    backend = folder / "backends/python"
    backend.mkdir(parents=True)
    stubs = triton / f"python_backend_stubs/{sys.version_info.major}.{sys.version_info.minor}"
    for file in (*(triton / "backends/python").iterdir(), *stubs.iterdir()):
        (backend / file.name).symlink_to(file)
    return triton / "bin/tritonserver"


def _repository(workflow: Path, folder: Path) -> None:
    work = works.work(workflow)
    if work.computes:
        _model(folder, "work", workflow, -1, instances=2)
        return
    batch = works.STUB_BATCH if work.name == "stub" else 1
    edges = ["TAKES", *(f"after_{stage.name}" for stage in work.stages[:-1]), "GIVES"]
    steps = []
    for place, stage in enumerate(work.stages):
        _model(folder, stage.name, workflow, place, batch=batch, last=place == len(work.stages) - 1)
        steps.append(STEP.format(name=stage.name, takes=edges[place], gives=edges[place + 1]))
    (folder / "work/1").mkdir(parents=True)
    (folder / "work/config.pbtxt").write_text(ENSEMBLE.format(batch=batch, steps="".join(steps)), "utf-8")


def _model(
    folder: Path, name: str, workflow: Path, stage: int, *, instances: int = 1, batch: int = 1, last: bool = True
) -> None:
    (folder / name / "1").mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), folder / name / "1/model.py")
    dynamic = "dynamic_batching { max_queue_delay_microseconds: 1000 }" if batch > 1 else ""
    config = MODEL.format(
        name=name,
        batch=batch,
        instances=instances,
        dynamic=dynamic,
        workflow=workflow,
        stage=stage,
        last="yes" if last else "no",
    )
    (folder / name / "config.pbtxt").write_text(config, "utf-8")


if __name__ == "__main__":
    contract.main(serve, "/v2/models/work/infer", headers={"Inference-Header-Content-Length": "0"}, answer_ends=True)
