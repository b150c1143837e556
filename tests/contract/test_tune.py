"""The command `tune` on a handler that runs: a process for each trial, each with torch in it."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from typer.testing import CliRunner

from tests.unit.conftest import CARD, HANDLERS, IMPORTS
from torchserve_dag.commands import app


def test_the_command_measures_a_real_handler(tmp_path: Path) -> None:
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "upper.py").write_text(IMPORTS + textwrap.dedent(HANDLERS["upper"]))
    (tmp_path / "handlers" / "upper.yaml").write_text(f'name: upper\nversion: "1.0"\n{CARD}')
    words = ["tune", "upper", "--seconds", "0.1", "--dry-run", "--json", "--project", str(tmp_path)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["chosen"].keys() == {"runtime", "precision", "channels_last", "batch"}
    assert found["changed"] == []
    assert all(trial["together"] > 0 and trial["off"] == 0 for trial in found["trials"])
