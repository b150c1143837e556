"""A project's own modules: imported by their absolute names, packed, and apart from those of another project."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.conftest import CARD, Write
from torchserve_dag.archives.build import build
from torchserve_dag.runtime.data.source import CheckError, Problem
from torchserve_dag.runtime.graph.read import read_graph
from torchserve_dag.runtime.messages import Failure, Text
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.worker import service
from torchserve_dag.runtime.worker.protocol import ServiceRequest
from torchserve_dag.runtime.workflow import Workflow

NODES = "answer: {function: mark}"


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text))


def answer_of(path: Path, text: str = "a") -> str:
    with Workflow.load(path) as workflow:
        (answer,) = workflow([Text(text)])
    assert isinstance(answer, Text), answer
    return answer.text


def built(project: Path, name: str = "flow", **options: Any) -> Path:
    report = build(Project(project), [name], **options)
    assert report.problems == []
    return project / "model_store" / f"{name}-1.0.mar"


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    return folder


def served(folder: Path) -> str:
    """What the unpacked archive answers."""
    loaded = service.load(folder, None)
    try:
        response = loaded.submit(ServiceRequest("1", b"a")).result(30)
        assert response.status == 200, response.body
        return str(json.loads(response.body)["text"])
    finally:
        loaded.close()


def problems_of(path: Path) -> list[Problem]:
    with pytest.raises(CheckError) as caught:
        read_graph(Project(path.parent.parent), path)
    return caught.value.problems


# Each way of importing a project's own module.

SHARED = {
    "helper.py": "MARK = 'root'",
    "src/mynet/__init__.py": "",
    "src/mynet/layers.py": "from .sizes import SIZE\nclass Net:\n    size = SIZE",
    "src/mynet/sizes.py": "SIZE = 7",
    "tools/text.py": "def loud(text): return text.upper()",
    "handlers/beside.py": "MARK = 'beside'",
    "workflows/rules.py": "from handlers.beside import MARK",
}
"""A module at the root, a package in `src/`, a folder without `__init__.py`, and modules beside handlers and workflows."""

WAYS = {
    "import helper": ("helper.MARK", "root", {"src/helper.py"}),
    "import helper as other": ("other.MARK", "root", {"src/helper.py"}),
    "from helper import MARK": ("MARK", "root", {"src/helper.py"}),
    "from helper import *": ("MARK", "root", {"src/helper.py"}),
    "import mynet.layers": (
        "str(mynet.layers.Net.size)",
        "7",
        {"src/mynet/__init__.py", "src/mynet/layers.py", "src/mynet/sizes.py"},
    ),
    "import mynet.sizes as sizes": ("str(sizes.SIZE)", "7", {"src/mynet/__init__.py", "src/mynet/sizes.py"}),
    "from mynet import sizes": ("str(sizes.SIZE)", "7", {"src/mynet/__init__.py", "src/mynet/sizes.py"}),
    "from tools.text import loud": ("loud('a')", "A", {"src/tools/__init__.py", "src/tools/text.py"}),
    "from handlers.beside import MARK": ("MARK", "beside", {"handlers/beside.py"}),
    "from .rules import MARK": ("MARK", "beside", {"handlers/beside.py", "workflows/rules.py"}),
    "from . import rules": ("rules.MARK", "beside", {"handlers/beside.py", "workflows/rules.py"}),
}


@pytest.mark.parametrize("statement", WAYS)
def test_a_module_of_the_project_is_imported_here_and_in_the_archive(
    write: Write, project: Path, tmp_path_factory: pytest.TempPathFactory, statement: str
) -> None:
    value, mark, packed = WAYS[statement]
    put(project, SHARED)
    functions = f"""
{statement}
def mark(text: Text) -> Text:
    return Text({value})

def inside(text: Text) -> Text:
    {"pass" if "*" in statement else statement}
    return Text(text.text + {value})
"""
    path = write("first: {function: mark}\nanswer: {function: inside, input: first}", functions)

    assert answer_of(path) == mark * 2
    archive = built(project)
    names = zipfile.ZipFile(archive).namelist()
    assert {n for n in names if n.startswith("src/") or n in {"handlers/beside.py", "workflows/rules.py"}} == packed

    folder = unpacked(archive, tmp_path_factory.mktemp("archive"))
    shutil.rmtree(project)
    assert served(folder) == mark * 2


def test_folders_of_the_project_may_be_links(write: Write, project: Path, tmp_path: Path) -> None:
    put(project, SHARED)
    functions = "import helper\nfrom mynet import sizes\ndef mark(text: Text) -> Text: return Text(helper.MARK + str(sizes.SIZE))"
    write(NODES, functions)
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("handlers", "workflows", "src", "helper.py"):
        (linked / name).symlink_to(project / name)
    (tmp_path / "link").symlink_to(linked)

    archive = built(tmp_path / "link")

    assert answer_of(tmp_path / "link" / "workflows" / "flow.yaml") == "root7"
    assert served(unpacked(archive, tmp_path / "archive")) == "root7"


def test_a_handler_shares_its_network_with_the_training_code(write: Write, project: Path) -> None:
    put(
        project,
        {
            "net.py": "class Net:\n    def run(self, text): return text[::-1]",
            "handlers/reverse.yaml": f'name: reverse\nversion: "1.0"\n{CARD}',
            "handlers/reverse.py": """
                from pathlib import Path
                from net import Net
                from torchserve_dag import Handler, Text
                class Reverse(Handler[Text, str, str, Text]):
                    def load(self, folder: Path, settings, placement): self.net = Net()
                    def example(self) -> Text: return Text("example")
                    def preprocess(self, item: Text) -> str: return item.text
                    def infer(self, batch): return [self.net.run(text) for text in batch]
                    def postprocess(self, output: str, item: Text) -> Text: return Text(output)
            """,
        },
    )

    assert answer_of(project / "handlers" / "reverse.yaml", "abc") == "cba"
    assert answer_of(write("answer: {handler: reverse}"), "abc") == "cba"


def test_a_pickle_of_the_training_code_is_read_in_load(project: Path) -> None:
    put(
        project,
        {
            "net.py": "class Net:\n    def __init__(self, mark): self.mark = mark",
            "train.py": "import pickle, net\npickle.dump(net.Net('trained'), open('weights/net.pickle', 'wb'))",
            "weights/note": "",
            "handlers/marker.yaml": f'name: marker\nversion: "1.0"\n{CARD}',
            "handlers/marker.py": """
                import importlib, pickle
                from net import Net
                from torchserve_dag import Handler, Text
                class Marker(Handler[Text, str, str, Text]):
                    def load(self, folder, settings, placement):
                        self.net = pickle.loads((folder / "net.pickle").read_bytes())
                        assert type(self.net) is Net
                        assert importlib.import_module("net").Net is Net
                    def example(self) -> Text: return Text("example")
                    def preprocess(self, item: Text) -> str: return item.text
                    def infer(self, batch): return batch
                    def postprocess(self, output: str, item: Text) -> Text: return Text(self.net.mark)
            """,
        },
    )
    subprocess.run([sys.executable, "train.py"], cwd=project, check=True)

    assert answer_of(project / "handlers" / "marker.yaml") == "trained"
    assert "net" not in sys.modules


# Apart from every other version in the process.


def test_two_projects_have_each_their_own_module_of_one_name(tmp_path: Path) -> None:
    functions = """
        from torchserve_dag import Text
        from helper import Kind, mark_of
        def mark(text: Text) -> Text:
            import helper
            assert helper.Kind is Kind
            assert isinstance(pickle_through(Kind()), Kind)
            return Text(mark_of())
        def pickle_through(value: object) -> object:
            import pickle
            return pickle.loads(pickle.dumps(value))
    """
    for name in "one", "two":
        put(
            tmp_path / name,
            {
                "helper.py": f"class Kind: pass\ndef mark_of(): return '{name}'",
                "workflows/flow.py": functions,
                "workflows/flow.yaml": 'name: flow\nversion: "1.0"\ndoes: A test.\nnodes:\n  answer: {function: mark}\noutput: answer',
            },
        )
    with (
        Workflow.load(tmp_path / "one/workflows/flow.yaml") as one,
        Workflow.load(tmp_path / "two/workflows/flow.yaml") as two,
    ):
        answers = [one([Text("")])[0], two([Text("")])[0], one([Text("")])[0]]

    assert answers == [Text("one"), Text("two"), Text("one")]
    assert "helper" not in sys.modules


def test_a_workflow_that_runs_keeps_the_module_that_it_was_loaded_with(write: Write, project: Path) -> None:
    put(project, {"helper.py": "MARK = 'old'"})
    path = write(NODES, "from helper import MARK\ndef mark(text: Text) -> Text: return Text(MARK)")
    with Workflow.load(path) as old:
        put(project, {"helper.py": "MARK = 'new'"})
        with Workflow.load(path) as new:
            assert [old([Text("")])[0], new([Text("")])[0]] == [Text("old"), Text("new")]


@pytest.fixture
def on_the_path(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(project)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.usefixtures("on_the_path")
def test_a_test_that_imports_a_module_has_the_classes_of_the_workflow(write: Write, project: Path) -> None:
    put(project, {"answers.py": "from dataclasses import dataclass\n@dataclass\nclass Report:\n    mark: str"})
    report = importlib.import_module("answers").Report
    path = write(NODES, "from answers import Report\ndef mark(text: Text) -> Report: return Report(text.text)")

    with Workflow.load(path) as workflow:
        assert workflow([Text("a")]) == [report("a")]


# In the archive.


def test_a_change_in_a_module_is_a_change_of_the_archive(write: Write, project: Path) -> None:
    put(project, SHARED)
    write(NODES, "from mynet.layers import Net\ndef mark(text: Text) -> Text: return Text(str(Net.size))")
    archive = built(project)
    first = json.loads(zipfile.ZipFile(archive).read("build.json"))["inputs"]["modules"]
    assert list(first) == ["mynet", "mynet.layers", "mynet.sizes", "workflows.flow"]

    put(project, {"helper.py": "MARK = 'not imported'"})
    assert [one.state for one in build(Project(project), ["flow"]).built] == ["unchanged"]
    put(project, {"src/mynet/sizes.py": "SIZE = 8"})
    report = build(Project(project), ["flow"])

    assert [p.what for p in report.problems] == ["flow-1.0.mar is already built from other input"]
    built(project, force=True)
    assert json.loads(zipfile.ZipFile(archive).read("build.json"))["inputs"]["modules"] != first


def test_a_type_that_only_the_yaml_names_brings_its_file(write: Write, project: Path, tmp_path: Path) -> None:
    nodes = "answer: {served: {model: other, takes: Text, gives: Mark}}"
    write(nodes, "@dataclass\nclass Mark:\n    mark: str")

    folder = unpacked(built(project), tmp_path / "archive")

    assert read_graph(Project(folder), folder / "workflows" / "flow.yaml").answer.__name__ == "Mark"


def test_a_worker_imports_the_archives_modules_with_the_archives_runtime(
    write: Write, project: Path, tmp_path: Path
) -> None:
    """As TorchServe starts it: the archive's folder is on Python's path, with other modules of these names behind it."""
    put(project, SHARED)
    write(NODES, "import helper\nfrom mynet.layers import Net\nfrom tools.text import loud\ndef mark(text: Text) -> Text:\n    from handlers.beside import MARK\n    return Text(f'{helper.MARK} {Net.size} {loud(MARK)}')")  # fmt: skip
    folder = unpacked(built(project), tmp_path / "archive")
    put(
        tmp_path / "installed",
        {"helper.py": "MARK = 'another'", "mynet/__init__.py": "", "tools/__init__.py": "", "handlers/__init__.py": ""},
    )
    program = """
import sys, serve
from pathlib import Path
import torchserve_dag
from torchserve_dag.runtime.worker.protocol import ServiceRequest
from torchserve_dag.runtime.worker.service import load
assert Path(torchserve_dag.__file__).is_relative_to(Path.cwd())
import helper
assert helper.MARK == "another"
loaded = load(Path.cwd(), None)
print(loaded.submit(ServiceRequest("1", b"a")).result(60).body.decode())
loaded.close()
"""

    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"text": "root 7 BESIDE"}


# What is refused, and what to write instead.

NOWHERE = "put nowhere.py at the project's root or into src/, or install the package and name it under requirements"
FROM_ROOT = (
    "its name from the project's root is workflows.rules: write `from workflows.rules import …`, or move it to the root"
)


@pytest.mark.parametrize(
    ("statement", "what", "help_"),
    [
        ("import nowhere", 'there is no module "nowhere"', NOWHERE),
        ("from nowhere import x", 'there is no module "nowhere"', NOWHERE),
        ("import rules", 'there is no module "rules"', FROM_ROOT),
        ("import mynet.layer", 'there is no module "mynet.layer"', 'did you mean "layers"?'),
        ("from mynet.layer import Net", 'there is no module "mynet.layer"', 'did you mean "layers"?'),
    ],
)
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in the function"])
def test_a_module_that_is_nowhere_is_named_with_its_line(
    write: Write, project: Path, statement: str, what: str, help_: str, *, inside: bool
) -> None:
    put(project, SHARED)
    function = "def mark(text: Text) -> Text:\n    {}\n    return text"
    path = write(NODES, function.format(statement) if inside else f"{statement}\n{function.format('pass')}")

    (problem,) = build(Project(project), ["flow"]).problems

    line = path.with_suffix(".py").read_text().splitlines().index(f"    {statement}" if inside else statement) + 1
    assert problem == Problem(str(path.with_suffix(".py")), line, what, help_)


def test_a_relative_import_that_leaves_the_project_is_refused(write: Write, project: Path) -> None:
    put(project, SHARED)
    path = write(NODES, "def mark(text: Text) -> Text:\n    from ..helper import MARK\n    return text")

    (problem,) = build(Project(project), ["flow"]).problems
    assert (problem.what, problem.help) == (
        '"from ..helper import" leads out of the project',
        "write the name from the project's root",
    )
    with Workflow.load(path) as workflow:
        (answer,) = workflow([Text("a")])
    assert isinstance(answer, Failure)


def test_a_mistake_in_a_module_is_named_there(write: Write, project: Path) -> None:
    path = write(NODES, "import helper\ndef mark(text: Text) -> Text: return text")

    put(project, {"helper.py": "\nimport json\n1 / 0\n"})
    (problem,) = problems_of(path)
    assert (problem.file, problem.line) == (str(project / "helper.py"), 3)
    assert problem.what == "importing it raised ZeroDivisionError: division by zero"

    put(project, {"helper.py": "def broken(:\n"})
    (problem,) = problems_of(path)
    assert (problem.file, problem.line) == (str(project / "helper.py"), 1)

    put(project, {"helper.py": "import sys\nsys.exit('no')\n"})
    (problem,) = problems_of(path)
    assert (problem.file, problem.line, problem.what) == (
        str(project / "helper.py"),
        2,
        "importing it raised SystemExit: no",
    )


@pytest.mark.parametrize(
    ("files", "statement", "what"),
    [
        ({"yaml/__init__.py": ""}, "import yaml", '"yaml" is {root}/yaml/__init__.py, and {yaml} too'),
        ({"helper.py": "", "src/helper.py": ""}, "import helper", '"helper" is {root}/src/helper.py, and {root}/helper.py too'),
        ({"random.py": ""}, "import random", "\"import random\" means Python's own module, and {root}/random.py is never imported"),
    ],
)  # fmt: skip
def test_a_name_that_means_two_modules_is_refused(
    write: Write, project: Path, files: dict[str, str], statement: str, what: str
) -> None:
    import yaml

    put(project, files)
    write(NODES, f"{statement}\ndef mark(text: Text) -> Text: return text")

    (problem,) = build(Project(project), ["flow"]).problems

    assert problem.what == what.format(root=project, yaml=yaml.__file__)


def test_a_folder_of_scripts_does_not_hide_an_installed_package(write: Write, project: Path) -> None:
    put(project, {"yaml/convert.py": "import nowhere"})
    path = write(NODES, "import yaml\ndef mark(text: Text) -> Text: return Text(yaml.safe_load('a'))")

    assert answer_of(path) == "a"
    assert not [name for name in zipfile.ZipFile(built(project)).namelist() if name.startswith("src/")]


@pytest.mark.parametrize(
    "statement",
    [
        "try:\n        import nowhere\n    except ImportError:\n        nowhere = None",
        "with contextlib.suppress(ImportError):\n        import nowhere",
        "if TYPE_CHECKING:\n        import nowhere",
    ],
)
def test_an_import_that_may_fail_is_not_refused(write: Write, project: Path, statement: str) -> None:
    functions = f"import contextlib\nfrom typing import TYPE_CHECKING\ndef mark(text: Text) -> Text:\n    {statement}\n    return text"
    path = write(NODES, functions)

    built(project)
    assert answer_of(path) == "a"


# Packages.


def test_required_packages_are_checked_and_recorded(write: Write, project: Path) -> None:
    import numpy as np

    path = write(NODES, "def mark(text: Text) -> Text: return text", more='requirements: ["Numpy>=1", "nowhere; python_version < \'3\'"]')  # fmt: skip

    inputs = json.loads(zipfile.ZipFile(built(project)).read("build.json"))["inputs"]

    assert inputs["packages"]["numpy"] == np.__version__
    assert answer_of(path) == "a"


@pytest.mark.parametrize(
    ("requirement", "what", "help_"),
    [
        ("nowhere>=1", "requirements: nowhere is not installed here", "install it: pip install 'nowhere>=1'"),
        ("numpy<1", "requirements: numpy {numpy} is installed here, and <1 is required", "install another: pip install 'numpy<1'"),
        ("numpy >> 1", 'requirements: "numpy >> 1" is not a requirement: ', "write it as for pip: timm>=1.0,<2"),
        ("numpy @ https://example.com/numpy.whl", "requirements: numpy @ https://example.com/numpy.whl: an address says no version", "write the package and its versions: numpy>=1.0"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_here_is_named_before_the_code_is_imported(
    write: Write, project: Path, requirement: str, what: str, help_: str
) -> None:
    import numpy as np

    path = write(NODES, "import nowhere\ndef mark(text: Text) -> Text: return text", more=f'requirements: ["{requirement}"]')  # fmt: skip

    (problem,) = problems_of(path)

    assert problem.what.startswith(what.format(numpy=np.__version__))
    assert (problem.help, Path(problem.file).name, problem.line) == (help_, "flow.yaml", 7)


def test_a_handler_names_its_packages_too(project: Path) -> None:
    (project / "handlers" / "upper.yaml").write_text(f'name: upper\nversion: "1.0"\nrequirements: [nowhere]\n{CARD}')

    assert [p.what for p in problems_of(project / "handlers" / "upper.yaml")] == [
        "requirements: nowhere is not installed here"
    ]


def test_a_worker_says_where_its_packages_are_others_than_at_the_build(
    write: Write, project: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(NODES, "def mark(text: Text) -> Text: return text", more='requirements: ["numpy>=1"]')
    folder = unpacked(built(project), tmp_path / "archive")
    about = json.loads((folder / "build.json").read_text())
    about["inputs"]["packages"]["numpy"] = "1.0"
    (folder / "build.json").write_text(json.dumps(about))

    with caplog.at_level(logging.WARNING):
        assert served(folder) == "a"

    import numpy as np

    assert f"flow 1.0: numpy is {np.__version__} here, and was 1.0 where the archive was built" in caplog.messages
