"""Many folders' files in one process: each imports its own by their bare names, and nobody else's."""

from __future__ import annotations

import importlib
import pickle
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from torchserve_dag.runtime.compat.modules import FolderModules

Make = Callable[..., FolderModules]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes a folder of these files; a 0 in a name is a slash."""
    made = []

    def write(folder: str, **files: str) -> FolderModules:
        for name, text in files.items():
            path = tmp_path / folder / f"{name.replace('0', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text))
        made.append(FolderModules(tmp_path / folder))
        return made[-1]

    yield write
    for one in made:
        one.close()


LAZY = """
    def answer():
        import model
        from model import NAME as name
        return model.NAME, name
"""


def test_an_import_inside_a_function_finds_its_own_folders_file(make: Make) -> None:
    folders = [make(name, handler=LAZY, model=f"NAME = '{name}'") for name in ("one", "two")]
    modules = [folder.module("handler") for folder in folders]

    assert [module.answer() for module in modules] == [("one", "one"), ("two", "two")]
    assert "model" not in sys.modules


def test_folders_do_not_meet_where_their_threads_import_at_the_same_time(make: Make) -> None:
    text = LAZY.replace("import model\n", "import model, sys\n")
    modules = [make(f"f{i}", handler=text, model=f"NAME = {i}").module("handler") for i in range(8)]
    together, found = threading.Barrier(len(modules)), {}

    def ask(i: int) -> None:
        together.wait()
        found[i] = [modules[i].answer() for _ in range(50)]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(modules))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {i: [(i, i)] * 50 for i in range(len(modules))}


def test_a_file_is_run_once_whoever_imports_it(make: Make) -> None:
    folder = make("f", handler="import a, b", a="import c", b="from c import runs", c="runs = []\nruns.append(1)")

    assert folder.module("handler").b.runs == [1]
    assert folder.module("handler").a.c is folder.module("c")


def test_packages_and_relative_imports_work(make: Make) -> None:
    folder = make(
        "f",
        handler="import pkg.inner\nimport pkg.inner as short\nfrom pkg import other\nfrom space.deep import here",
        pkg0__init__="",
        pkg0inner="from . import other\nfrom .other import NAME\nimport top\nfrom pkg.other import NAME as again",
        pkg0other="NAME = 'other'",
        space0deep="here = 'no __init__ is needed'",
        top="",
    )
    handler = folder.module("handler")

    assert (handler.pkg.inner.NAME, handler.short.again, handler.here) == ("other", "other", "no __init__ is needed")
    assert handler.short.top is folder.module("top")


def test_other_libraries_are_everybodys(make: Make) -> None:
    handler = make("f", handler="import json, torch, numpy\nfrom os import path", json="bad = 1").module("handler")

    assert (handler.json, handler.torch) == (sys.modules["json"], sys.modules["torch"])


def test_what_is_not_there_is_missed_as_ever(make: Make) -> None:
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        make("f", handler="import no_such_package").module("handler")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        make("g", handler="from model import nothing", model="").module("handler")


def test_while_it_loads_a_file_is_found_by_importlib_pickle_and_its_place(make: Make, tmp_path: Path) -> None:
    """TorchServe's base handler imports its model by name; weights may be a pickle; a handler may open a file."""
    folder = make("f", model="class Net: ...", handler="from model import Net")
    (tmp_path / "f" / "names.txt").write_text("a b")
    before = Path.cwd()

    with folder.loading():
        by_name = importlib.import_module("model")
        unpickled = pickle.loads(b"cmodel\nNet\n.")  # noqa: S301 (written here)
        text = Path("names.txt").read_text()

    assert by_name is folder.module("model")
    assert unpickled is folder.module("handler").Net
    assert text == "a b"
    assert "model" not in sys.modules
    assert Path.cwd() == before


def test_a_module_of_the_same_name_comes_back_after_loading(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("model")
    monkeypatch.setitem(sys.modules, "model", other)
    folder = make("f", model="NAME = 'own'", handler="import model")

    with folder.loading():
        assert importlib.import_module("model").NAME == "own"
        assert folder.module("handler").model.NAME == "own"

    assert sys.modules["model"] is other


def test_only_the_files_that_are_named_count(make: Make, tmp_path: Path) -> None:
    make("f", flow="", other_flow="")
    alone = FolderModules(tmp_path / "f", {"flow"})
    (tmp_path / "f" / "flow.py").write_text("import other_flow")

    with pytest.raises(ModuleNotFoundError, match="other_flow"):
        alone.module("flow")
    alone.close()


def test_a_changed_file_is_read_again(make: Make, tmp_path: Path) -> None:
    """Also within the same second, and with the same size."""
    make("f", model="NAME = 'a'").module("model")

    assert make("f", model="NAME = 'b'").module("model").NAME == "b"


def test_nothing_stays_after_close(make: Make) -> None:
    before = set(sys.modules)
    folder = make("f", handler="import pkg.inner", pkg0__init__="", pkg0inner="")
    folder.module("handler")

    folder.close()

    assert {name for name in set(sys.modules) - before if "folder" in name} == set()


def test_a_model_in_a_folder_can_be_compiled(make: Make) -> None:
    """Torch reads the globals of a function, which here have an import statement of their own."""
    text = """
        import torch
        from parts import double
        class Net(torch.nn.Module):
            def forward(self, x):
                return double(x) + min(3, 4)
    """
    net = make("f", model=text, parts="def double(x):\n    return x * 2").module("model").Net()

    compiled = torch.compile(net, backend="eager")

    assert compiled(torch.ones(2)).tolist() == [5.0, 5.0]
    assert torch.jit.script(net)(torch.ones(2)).tolist() == [5.0, 5.0]
