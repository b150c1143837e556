"""`torchserve-dag.yaml`: the project's settings, checked like a workflow."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.stack import settings
from torchserve_dag.stack.settings import ProjectSettings


def test_without_a_file_the_defaults_serve(tmp_path: Path) -> None:
    assert settings.read(tmp_path, []).project == ProjectSettings(host="torchserve")


def test_the_host_is_torchserve(tmp_path: Path) -> None:
    (tmp_path / "torchserve-dag.yaml").write_text("host: torchserve\n")

    assert settings.read(tmp_path, []).project == ProjectSettings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosts: torchserve", 'did you mean "host"'),
        ("host: dirct", "torchserve"),
        ("host: [torchserve]", "host"),
        ("jobs: {}", 'unknown key "jobs"'),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "torchserve-dag.yaml"
    path.write_text(f"# a comment\n{text}\n")
    with pytest.raises(CheckError) as error:
        settings.read(tmp_path, [])

    assert said in str(error.value)
    assert str(error.value).startswith(f"{path}:2:")


def test_the_mistakes_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "torchserve-dag.yaml").write_text("host: nobody\n")
    (tmp_path / "front_door.yaml").write_text("listen: nowhere\n")
    (tmp_path / "routes.yaml").write_text('m: {versions: {"1.0": 1}}\n')
    found = CliRunner().invoke(app, ["check", "--project", str(tmp_path)])

    assert found.exit_code == 1
    for name in ("torchserve-dag.yaml:1", "front_door.yaml:1", "routes.yaml:1"):
        assert name in found.stderr
