"""A small project, made on the spot: handlers without weights, so that the engine is tested in milliseconds."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

from torchserve_dag.runtime import logs

hypothesis.settings.register_profile(  # a busy machine is slow, and that is no failure
    "unit", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("unit")

CARD = """
card:
  does: A small model for tests.
  input: Text.
  output: Text.
  limits: Made on the spot.
  weights: []
"""

HANDLERS = {
    "upper": """
        class Upper(Handler[Text, str, str, Text]):
            def load(self, folder, settings, placement): pass
            def example(self) -> Text: return Text("example")
            def preprocess(self, item: Text) -> str:
                if item.text == "bad": raise InputError("That text is bad.", 422)
                if item.text == "slow": time.sleep(30)
                return item.text
            def infer(self, batch):
                if "poison" in batch: raise RuntimeError("poison")
                return [text.upper() for text in batch]
            def postprocess(self, output: str, item: Text) -> Text: return Text(output)
        """,
    "words": """
        @dataclass(frozen=True)
        class Word:
            text: str
            size: int

        @dataclass(frozen=True)
        class Words:
            words: list[Word]

        class Split(Handler[Text, str, str, Words]):
            def load(self, folder, settings, placement): pass
            def example(self) -> Text: return Text("two words")
            def preprocess(self, item: Text) -> str: return item.text
            def infer(self, batch): return batch
            def postprocess(self, output: str, item: Text) -> Words:
                return Words([Word(w, len(w)) for w in output.split()])
        """,
}

IMPORTS = """
from __future__ import annotations
import time
from dataclasses import dataclass
from pathlib import Path
from torchserve_dag import Handler, InputError, Skipped, Text

def wait_at(gate: str) -> None:
    end = time.monotonic() + 60
    while not Path(gate).exists() and time.monotonic() < end:
        time.sleep(0.005)
"""
"""What every handler and workflow of a test may use; who waits at a gate goes on when its file is there."""

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_fault_is_known_from_another_test() -> None:
    """A fault has its traceback once a minute, and two tests may raise at one place."""
    logs.forget()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "handlers").mkdir()
    (tmp_path / "workflows").mkdir()
    for name, code in HANDLERS.items():
        (tmp_path / "handlers" / f"{name}.py").write_text(IMPORTS + textwrap.dedent(code))
        (tmp_path / "handlers" / f"{name}.yaml").write_text(f'name: {name}\nversion: "1.0"\n{CARD}')
    return tmp_path


@pytest.fixture
def write(project: Path) -> Write:
    """Writes `workflows/flow.yaml` and its functions; gives the path."""

    def write_workflow(nodes: str, functions: str = "", output: str = "answer", more: str = "") -> Path:
        body = textwrap.indent(textwrap.dedent(nodes).strip(), "  ")
        text = f'name: flow\nversion: "1.0"\ndoes: A test.\nnodes:\n{body}\noutput: {output}\n{more}'
        (project / "workflows" / "flow.yaml").write_text(text)
        (project / "workflows" / "flow.py").write_text(IMPORTS + textwrap.dedent(functions))
        return project / "workflows" / "flow.yaml"

    return write_workflow


Mar = Callable[..., Path]


@pytest.fixture
def mar(project: Path, monkeypatch: pytest.MonkeyPatch) -> Mar:
    """Makes `model_store/NAME.mar` with TorchServe's own archiver, of a handler's code and other files."""
    from model_archiver.model_archiver_config import ModelArchiverConfig
    from model_archiver.model_packaging import package_model
    from model_archiver.model_packaging_utils import ModelExportUtils

    def make(name: str, code: str, *, more: dict[str, str | bytes] | None = None, **settings: str) -> Path:
        sources, store, private = project / f"{name}-sources", project / "model_store", project / f"{name}-tmp"
        for folder in (sources, store, private):
            folder.mkdir(exist_ok=True)
        monkeypatch.setattr("tempfile.tempdir", str(private))  # the archiver deletes $TMPDIR/NAME before it starts
        (sources / "handler.py").write_text(textwrap.dedent(code))
        for file, content in (more or {}).items():
            (sources / file).write_bytes(content if isinstance(content, bytes) else textwrap.dedent(content).encode())
        extra = [str(sources / file) for file in more or {} if file not in settings.values()]
        config = ModelArchiverConfig(
            model_name=name,
            version="1.0",
            handler=str(sources / "handler.py"),
            extra_files=",".join(extra) or None,
            export_path=str(store),
            **{key: str(sources / file) for key, file in settings.items()},
        )
        package_model(config, ModelExportUtils.generate_manifest_json(config))
        monkeypatch.undo()
        return store / f"{name}.mar"

    return make
