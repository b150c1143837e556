"""What `build` refuses, `check` says beforehand, in the same words; what `check` accepts, `build` builds and loads."""

from __future__ import annotations

import hashlib
import json
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.unit.conftest import CARD, IMPORTS
from torchserve_dag.archives.build import build, check
from torchserve_dag.commands import app
from torchserve_dag.runtime.project.folders import Project

Break = Callable[[Path], None]

OTHER = f"'{'0' * 64}'"
"""A hash that no weights have."""
FLOW = 'name: flow\nversion: "1.0"\ndoes: A test.\nnodes:\n{nodes}output: answer\n{more}'
SAME = "def same(text: Text) -> Text: return text\n"


def flow(nodes: str = "  answer: {handler: upper}\n", functions: str = SAME, more: str = "") -> Break:
    """A workflow like this one."""

    def write(project: Path) -> None:
        (project / "workflows" / "flow.yaml").write_text(FLOW.format(nodes=nodes, more=more))
        (project / "workflows" / "flow.py").write_text(IMPORTS + functions)

    return write


def upper(old: str = "", new: str = "", *, suffix: str = ".yaml") -> Break:
    """A handler with something else in one of its files."""

    def write(project: Path) -> None:
        path = project / "handlers" / f"upper{suffix}"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new) if old else path.read_text() + new)

    return write


def weigh(line: str, content: str | None = "limit") -> Break:
    """A handler with weights."""

    def write(project: Path) -> None:
        upper("weights: []", f"weights: [{{file: limit.txt, source: by hand, licence: CC0{line}}}]")(project)
        if content is not None:
            (project / "weights").mkdir()
            (project / "weights" / "limit.txt").write_text(content)

    return write


def after_a_build(change: Break) -> Break:
    """Something that changes when the version is built already."""

    def write(project: Path) -> None:
        flow()(project)
        assert build(Project(project)).problems == []
        change(project)

    return write


def unlink(name: str) -> Break:
    return lambda project: (project / name).unlink()


def both(*changes: Break) -> Break:
    def write(project: Path) -> None:
        for change in changes:
            change(project)

    return write


def put(name: str, text: str | bytes) -> Break:
    def write(project: Path) -> None:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(text if isinstance(text, bytes) else textwrap.dedent(text).encode())

    return write


MANY_PHOTOS = "from torchserve_dag import Photo\ndef many(text: Text) -> list[Photo]: return []\n"

COUNT_PHOTOS = "from torchserve_dag import Photo\ndef count(photos: list[Photo]) -> int: return len(photos)\n"

REFUSED: dict[str, tuple[Break, str]] = {
    "a card without a hash": (weigh(""), "the card has no sha256"),
    "weights that changed": (weigh(f", sha256: {OTHER}"), "and the card says 000"),
    "weights outside the folder": (
        both(weigh(""), upper("limit.txt", "../limit.txt")),
        '"../limit.txt" is not below weights/',
    ),
    "a type that cannot be written": (
        flow("  answer: {function: many}\n", MANY_PHOTOS),
        "is list[Photo] and cannot be written as JSON",
    ),
    "a type that no client can send": (
        flow("  answer: {function: count}\n", COUNT_PHOTOS),
        "it takes list[Photo], which no client can send",
    ),
    "an answer that JSON does not know": (
        flow("  answer: {function: one}\n", "import enum\nclass E(enum.Enum):\n    A = object()\ndef one(text: Text) -> E: return E.A\n"),
        "is E and cannot be written as JSON",
    ),
    "a request that nobody can send": (
        flow("  answer: {function: one}\n", "def one(text: set[int]) -> str: return ''\n"),
        "it takes set[int], which no client can send",
    ),
    "an archive that is not below the root": (
        both(put("../other.mar", b""), flow("  answer: {torchserve: {archive: ../other.mar}}\n")),
        "../other.mar is not below the project's root",
    ),
    "a version that is built of other code": (
        after_a_build(upper(new="\n# changed\n", suffix=".py")),
        "upper-1.0.mar is already built from other input",
    ),
    "a version that is built of another card": (
        after_a_build(upper("Made on the spot", "Made here")),
        "upper-1.0.mar is already built from other input",
    ),
    "a version that is built of another workflow": (
        after_a_build(flow(more="serve: {batch: 3}\n")),
        "flow-1.0.mar is already built from other input",
    ),
    "an export that is built of another workflow": (
        after_a_build(both(unlink("model_store/flow-1.0.mar"), flow(more="serve: {batch: 3}\n"))),
        "flow-1.0-answer.mar is already built from other input",
    ),
    "a version in whose place is no archive": (
        put("model_store/upper-1.0.mar", b"no archive"),
        "upper-1.0.mar is already built from other input",
    ),
    "a module that is nowhere": (
        upper("    def example", "    def other(self): import nowhere\n    def example", suffix=".py"),
        'there is no module "nowhere"',
    ),
    "a module with a mistake that only a function imports": (
        both(
            put("helper.py", "def broken(:\n"),
            upper("    def example", "    def other(self): import helper\n    def example", suffix=".py"),
        ),
        "not valid Python",
    ),
    "a name that means two modules": (
        both(put("helper.py", ""), put("src/helper.py", ""), upper(new="\nimport helper\n", suffix=".py")),
        '"helper" is ',
    ),
    "a package that is not here": (upper(new="requirements: [nowhere]\n"), "requirements: nowhere is not installed"),
    "a module of another's package": (upper(new="\nimport nowhere\n", suffix=".py"), 'there is no module "nowhere"'),
    "a misspelt key": (upper("does:", "dos:"), 'unknown key "dos"'),
    "a version that is no version": (upper('"1.0"', '"new"'), '"new" is not a version'),
    "two files of one version": (
        both(put("handlers/again.yaml", f'name: upper\nversion: "1.0"\n{CARD}'), put("handlers/again.py", "")),
        "upper 1.0 is ",
    ),
    "a mistake in the YAML": (upper("card:", "card: ["), "not valid YAML"),
    "a handler's code that is not there": (unlink("handlers/upper.py"), "there is no "),
    "types that do not match": (
        flow("  size: {function: size}\n  answer: {handler: upper, input: size}\n", "def size(text: Text) -> int: return 1\n"),
        'takes Text, and "size" is int',
    ),
    "a score that is no number": (flow(more="serve: {score: text}\n"), '"text" is str, not a number'),
    "an archive that is not there": (flow("  answer: {torchserve: {archive: no.mar}}\n"), "there is no archive no.mar"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_build_refuses_check_says_in_the_same_words(project: Path, kind: str) -> None:
    broken, what = REFUSED[kind]
    flow()(project)
    broken(project)
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"}

    _, checked = check(Project(project))

    after = {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert after == before, "check writes nothing"
    built = build(Project(project))
    assert checked.problems == built.problems
    assert any(what in problem.what for problem in checked.problems), checked.problems


ACCEPTED: dict[str, Break] = {
    "handlers and a workflow": flow(),
    "built already": after_a_build(lambda _: None),
    "built already, and the export is gone": after_a_build(unlink("workflow_store/flow-1.0-answer.mar")),
    "built already, and only the commit differs": after_a_build(put("notes.md", "new")),
    "no export": flow("  answer: {function: same}\n"),
    "weights with their hash": weigh(f", sha256: {hashlib.sha256(b'limit').hexdigest()}"),
    "weights that are elsewhere": weigh(f", sha256: {OTHER}", None),
    "modules of its own": both(put("src/mine/__init__.py", "X = 1"), upper(new="\nfrom mine import X\n", suffix=".py")),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_check_accepts_is_built(project: Path, kind: str) -> None:
    ACCEPTED[kind](project)

    good, checked = check(Project(project))
    built = build(Project(project))

    assert (checked.problems, built.problems) == ([], [])
    assert checked.left_out == built.left_out
    left_out = {(left.name, left.version) for left in checked.left_out}
    named = {(one.target.name, one.target.version) for one in good}
    assert named - left_out == {(one.name, one.version) for one in built.built}


def test_weights_that_are_not_here_are_a_problem_where_they_are_asked_for(project: Path) -> None:
    weigh(f", sha256: {OTHER}", None)(project)

    _, checked = check(Project(project), ["upper"])

    assert [problem.what for problem in checked.problems] == [f"there are no weights {project}/weights/limit.txt"]
    assert checked.problems == build(Project(project), ["upper"]).problems


def test_the_command_says_what_is_left_out_and_does_not_fail(project: Path) -> None:
    weigh(f", sha256: {OTHER}", None)(project)
    done = CliRunner().invoke(app, ["check", "--project", str(project)])
    shown = CliRunner().invoke(app, ["check", "--project", str(project), "--json"])

    assert done.exit_code == 0, done.output
    assert "left out upper 1.0" in " ".join(done.output.split())
    assert [left["name"] for left in json.loads(shown.output)["left_out"]] == ["upper"]


def test_a_module_beside_handlers_is_not_taken_for_a_forgotten_handler(project: Path) -> None:
    put("handlers/boxes.py", "SIZE = 1")(project)
    alone = CliRunner().invoke(app, ["check", "--project", str(project)])
    upper(new="\nfrom handlers.boxes import SIZE\n", suffix=".py")(project)
    imported = CliRunner().invoke(app, ["check", "--project", str(project)])

    assert "no .yaml names this handler" in " ".join(alone.output.split())
    assert imported.exit_code == 0, imported.output


def test_an_archive_of_accepted_code_is_a_project_that_is_accepted(project: Path, tmp_path: Path) -> None:
    """What an archive lacks, its own check finds: so nothing is left behind that the code needs."""
    flow(more="requirements: [pillow]\n")(project)
    put("src/mine/__init__.py", "from .sizes import SIZE")(project)
    put("src/mine/sizes.py", "SIZE = 1")(project)
    upper(new="\nfrom mine import SIZE\n", suffix=".py")(project)
    (archive,) = [one.path for one in build(Project(project), ["flow"]).built if one.path.name == "flow-1.0.mar"]
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "archive")

    good, report = check(Project(tmp_path / "archive"))

    assert report.problems == []
    assert sorted(one.target.name for one in good) == ["flow", "upper"]
