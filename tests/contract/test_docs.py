"""Every block of `docs/workflows/`, `docs/handlers.md` and `docs/migration.md` is what it says it is.

A page is played from top to bottom in a project of its own: files are written, code runs, and what it prints and
how its workflow is drawn must be what the page shows. With UPDATE_DOCS=1 in the environment it is written into the
page instead.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from click import Context

from tests.contract.conftest import ROOT
from torchserve_dag.commands import app
from torchserve_dag.pictures.mermaid import mermaid
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.project.folders import Project

DOCS = ROOT / "docs"
INDEX = DOCS / "workflows" / "README.md"
PAGES = [*sorted((DOCS / "workflows").glob("*.md")), DOCS / "handlers.md", DOCS / "migration.md"]
UPDATE = bool(os.environ.get("UPDATE_DOCS"))

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FILE = re.compile(r"# ((?:workflows|handlers|sources)/[\w.-]+)\n")
THEIRS = re.compile(r"# (Triton|KServe|TorchServe): ")
"""A block of another server's own; it is read, not run."""


class Play:
    """A page at work. `text` is the page as it should be."""

    def __init__(self, page: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root = root
        self.capsys = capsys
        self.last = root
        """The workflow that was written last; what a picture shows."""
        self.printed = ""
        """By the last block of code, until the page has shown it."""
        self.files: set[str] = set()
        self.text = BLOCK.sub(lambda found: self.block(found[1], found[2]), page.read_text("utf-8"))
        assert not self.printed, "a block prints what the page does not show"
        for name in self.files:  # those that no code loads are checked too
            if name.startswith("workflows/") and name.endswith(".yaml"):
                read_graph(Project(root), root / name)

    def block(self, kind: str, text: str) -> str:
        named = FILE.match(text)
        if kind in {"text", "mermaid"}:
            text = self.shown() if kind == "text" else self.drawn()
        elif kind == "json":
            json.loads(text)
        elif kind in {"yaml", "python"} and THEIRS.match(text):
            (ast.parse if kind == "python" else yaml.safe_load)(text)
        elif kind in {"yaml", "python"} and named:
            self.file(named[1], text)
        elif kind == "python":
            self.code(text)
        elif kind == "sh":
            self.commands(text)
        else:
            assert kind == "textproto", f"nothing tests a block of {kind} like {text[:80]!r}"
        return f"```{kind}\n{text}```"

    def file(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        self.files.add(name)
        if name.startswith("workflows/") and name.endswith(".yaml"):
            self.last = path

    def code(self, text: str) -> None:
        assert not self.printed, "a block prints what the page does not show"
        self.capsys.readouterr()
        exec(compile(text, "the page", "exec"), {"__name__": "__main__"})  # noqa: S102 (our own pages)
        self.printed = self.capsys.readouterr().out

    def shown(self) -> str:
        assert self.printed, "a page shows what nothing printed"
        printed, self.printed = self.printed, ""
        return printed

    def drawn(self) -> str:
        return mermaid(read_graph(Project(self.root), self.last))

    def commands(self, text: str) -> None:
        """An archiver runs; commands of ours are read as the command line reads them; what else there is, is curl."""
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] == "torch-model-archiver":
                (self.root / "model_store").mkdir(exist_ok=True)
                (self.root / "tmp").mkdir(exist_ok=True)  # the archiver deletes $TMPDIR/NAME before it starts
                environment = {**os.environ, "TMPDIR": str(self.root / "tmp")}
                program = Path(sys.executable).with_name(words[0])
                subprocess.run([program, *words[1:]], cwd=self.root, env=environment, check=True, capture_output=True)
            elif words[0] == "torchserve-dag":
                parse(words[1:])
            else:
                assert words[0] == "curl", line


def parse(words: list[str]) -> None:
    """Raises click's UsageError for what the command line would refuse."""
    group: Any = typer.main.get_command(app)
    with Context(group) as context:
        name, command, rest = group.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_shows_what_happens(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    played = Play(page, tmp_path, capsys).text
    if UPDATE:
        page.write_text(played, "utf-8")

    assert played == page.read_text("utf-8")


def test_the_index_has_every_page() -> None:
    rows = re.findall(r"^\| \[.*?\]\(([\w-]+\.md)\)", INDEX.read_text("utf-8"), re.MULTILINE)

    assert sorted(rows) == sorted(page.name for page in PAGES if page.parent == INDEX.parent and page != INDEX)
