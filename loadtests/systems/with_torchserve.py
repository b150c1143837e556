# /// script
# dependencies = []
# [tool.bench]
# name = "TorchServe, one handler"
# arrangement = """\
# Photos: 2 workers x 1 thread, batches of 8; stub: 2 workers, batches of 32, so that one forms while the other is \
# on the device; chains: 1 worker, batches of 16; a batch waits 1 ms \
# (docs.pytorch.org/serve/performance_guide.html, batch_inference_with_ts.html)."""
# ///
"""TorchServe with one handler that does the whole work, archived with torch-model-archiver."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import contract
import torchserve
import works
import yaml

MODEL = "monolith"


def main(workflow: Path) -> None:
    with contract.alone() as folder:
        work = works.work(workflow)
        workers, batch = (2, 8) if work.computes else (2, works.STUB_BATCH) if work.name == "stub" else (1, 16)
        _archive(folder, workers, batch)
        os.environ["BENCH_WORKFLOW"] = str(workflow)
        where, child = torchserve.start(folder, folder, load_models="all")
        served = contract.Served(
            rest=f"{where.inference}/predictions/{MODEL}",
            grpc={"target": where.grpc_inference, "model": MODEL, "version": "1.0"},
            metrics=f"{where.metrics}/metrics",
        )
        contract.announce(served, workflow, child)


def _archive(folder: Path, workers: int, batch: int) -> None:
    settings = {"minWorkers": workers, "maxWorkers": workers, "batchSize": batch, "maxBatchDelay": 1}
    (folder / "model-config.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", MODEL, "--version", "1.0"]
    command += ["--handler", str(Path(__file__).with_name("monolith.py")), "--export-path", str(folder)]
    command += ["--config-file", str(folder / "model-config.yaml"), "--force"]
    subprocess.run(  # noqa: S603 (our own arguments)
        command, env={**os.environ, "TMPDIR": str(folder)}, stdout=sys.stderr, check=True
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workflow", type=Path)
    main(parser.parse_args().workflow.resolve())
