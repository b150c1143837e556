"""What `torchserve-dag new` writes is a project that is in order: check, lint, types, its own test, its archive."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny_models import make_detector, make_photo_classifier

ROOT = Path(__file__).parents[2]
SHOUTER = """
from ts.torch_handler.base_handler import BaseHandler

class Shouter(BaseHandler):
    def initialize(self, context): self.initialized = True
    def preprocess(self, data): return [row.get("data") or row.get("body") for row in data]
    def inference(self, texts): return [bytes(text).decode().upper() for text in texts]
    def postprocess(self, texts): return [{"text": text} for text in texts]
"""
pytestmark = pytest.mark.timeout(600)


def run(folder: Path, *words: str) -> str:
    """`python -m WORDS` in the project."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "text"
    run(folder.parent, "torchserve_dag", "new", "text")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With small random models where the README has hub models downloaded."""
    folder = tmp_path_factory.mktemp("new") / "photos"
    run(folder.parent, "torchserve_dag", "new", "photos", "--template", "detect-classify")
    torch.manual_seed(0)
    make_detector(folder / "weights" / "hustvl" / "yolos-tiny")
    make_photo_classifier(folder / "weights" / "google" / "vit-base-patch16-224")
    return folder


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new") / "wrapped"
    (folder.parent / "shouter.py").write_text(SHOUTER)
    run(folder.parent, "torchserve_dag", "new", "wrapped", "--template", "torchserve", "--from", "shouter.py")
    return folder


@pytest.mark.parametrize("template", ["text", "photos", "wrapped"])
def test_it_passes_its_own_check_build_and_test(template: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(template)
    run(folder, "torchserve_dag", "build", "--update-cards")
    tested = run(folder, "pytest", "-p", "no:cacheprovider", "-rs")

    assert "0 problems" in run(folder, "torchserve_dag", "check")
    assert list((folder / "model_store").glob("*.mar"))
    assert "skipped" not in tested


@pytest.mark.parametrize("template", ["text", "photos"])
def test_its_code_passes_the_lint_and_the_types_of_this_repository(
    template: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(template)
    ignored = "INP001,S101,T201,PLR2004,ARG002,I001,RUF100"  # scripts print, tests assert, a handler's stages have one signature
    run(folder, "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--extend-ignore", ignored, ".")
    run(folder, "ruff", "check", "--isolated", "--extend-ignore", "I001,RUF100", ".")
    # With the options and the cache of scripts/check, which has analysed torch and transformers already.
    options = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    run(folder, "mypy", *options, ".")


def test_the_text_model_knows_sentences_that_it_was_not_trained_on(text: Path) -> None:
    program = """
from torchserve_dag import Workflow
sentences = ["I lost my umbrella on the bus.", "Das Fenster ist offen.", "Le train part dans une heure.",
             "Il gatto dorme sul divano.", "Mi hermana quiere una bicicleta nueva."]
with Workflow.load("handlers/language.yaml") as model:
    print([answer.best.name for answer in model([sentence.encode() for sentence in sentences])])
"""
    (text / "try_it.py").write_text(program)

    assert run(text, "try_it").strip() == str(["English", "German", "French", "Italian", "Spanish"])
    (text / "try_it.py").unlink()


def test_each_template_imports_from_the_top_of_the_package_only() -> None:
    for path in (ROOT / "src" / "torchserve_dag" / "templates").rglob("*.py"):
        assert "torchserve_dag." not in path.read_text("utf-8"), path
