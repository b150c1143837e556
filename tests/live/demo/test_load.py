"""The load tests run, over REST and over gRPC, and no request fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.live.conftest import ROOT, Serving


@pytest.mark.parametrize("users", ["rest.py", "grpc_users.py"])
def test_ten_seconds_of_four_users_have_no_failure(serving: Serving, tmp_path: Path, users: str) -> None:
    words = ["--config", ROOT / "loadtests" / "locust.conf", "-f", ROOT / "loadtests" / users]
    words += ["--users", "4", "--spawn-rate", "4", "--run-time", "10s"]
    words += ["--html", tmp_path / "report.html", "--csv", tmp_path / "stats"]
    done = subprocess.run(
        [sys.executable, "-m", "locust", *map(str, words)],
        env={**os.environ, "TORCHSERVE_DAG_PROJECT": str(serving.root)},
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    with (tmp_path / "stats_stats.csv").open() as file:
        total = next(row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    assert int(total["Failure Count"]) == 0
    assert int(total["Request Count"]) > 0  # how many is the machine's matter
    assert (tmp_path / "report.html").stat().st_size > 10_000
