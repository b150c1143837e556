"""The pages of docs/reference/, and the picture of docs/architecture.md, are what scripts/reference writes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any

import pytest
import typer
from click import Command, Group

from tests.contract.conftest import ROOT
from torchserve_dag.commands import app


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    loader = SourceFileLoader("reference", str(ROOT / "scripts" / "reference"))
    spec = importlib.util.spec_from_loader("reference", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_every_page_says_what_the_code_says(reference: ModuleType) -> None:
    different = [
        str(path.relative_to(ROOT))
        for path, text in reference.pages().items()
        if not path.is_file() or path.read_text("utf-8") != text
    ]

    assert different == [], "run .venv/bin/python scripts/reference"


def test_no_page_is_left_of_what_is_gone(reference: ModuleType) -> None:
    written = {path for path in reference.pages() if path.parent.name == "reference"}

    assert set((ROOT / "docs" / "reference").glob("*.md")) == written


def commands(command: Command, name: str = "torchserve-dag") -> Iterator[tuple[str, Command]]:
    yield name, command
    if isinstance(command, Group):
        for inner, found in command.commands.items():
            yield from commands(found, f"{name} {inner}")


def test_every_command_and_option_has_its_help() -> None:
    group: Any = typer.main.get_command(app)
    silent = [
        f"{name} {parameter.name if parameter else ''}"
        for name, command in commands(group)
        for parameter in [None, *command.params]
        if not getattr(parameter or command, "help", None)
    ]

    assert silent == []
