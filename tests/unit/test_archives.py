"""What goes into an archive, what is refused, and that the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml

import torchserve_dag
from tests.unit.conftest import Write
from torchserve_dag.archives import contents, mar, protocol, stamp, war
from torchserve_dag.archives.build import Report, build
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.weight_files import sha256

WEIGHTS = b"0.5\n"
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


def weigh(project: Path, line: str, *, there: bool = True) -> None:
    """Gives the handler `upper` weights, with this line in its card."""
    path = project / "handlers" / "upper.yaml"
    path.write_text(path.read_text().replace("weights: []", f"weights:\n    - {line}"))
    if there:
        (project / "weights").mkdir(exist_ok=True)
        (project / "weights" / "limit.txt").write_bytes(WEIGHTS)


def line(**more: str) -> str:
    return json.dumps({"file": "limit.txt", "source": "by hand", "licence": "CC0", **more})


def weigh_again(project: Path, before: str, after: str) -> None:
    path = project / "handlers" / "upper.yaml"
    path.write_text(path.read_text().replace(before, after))


def sentences(report: Report) -> str:
    return "\n".join(map(str, report.problems))


def entries(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_same_input_gives_same_bytes_in_another_folder(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    weigh(project, line(sha256=DIGEST))
    other = tmp_path_factory.mktemp("elsewhere") / "with blanks"
    shutil.copytree(project, other, copy_function=shutil.copy)  # other times, too

    one, two = build(Project(project), ["upper"]), build(Project(other), ["upper"])

    assert one.built[0].path.read_bytes() == two.built[0].path.read_bytes()


def test_an_archive_is_a_project_with_the_runtime_and_its_own_handlers_only(project: Path) -> None:
    weigh(project, line(sha256=DIGEST))
    (project / "weights" / "other.bin").write_bytes(b"not named by a card")
    (built,) = build(Project(project), ["upper"]).built
    names = entries(built.path)

    assert built.path == project / "model_store" / "upper-1.0.mar"
    assert [n for n in names if n.startswith(("handlers/", "weights/", "workflows/"))] == [
        "handlers/upper.py",
        "handlers/upper.yaml",
        "weights/limit.txt",
    ]
    assert {"MAR-INF/MANIFEST.json", "build.json", "model-config.yaml", "serve.py"} < set(names)
    package = Path(torchserve_dag.__file__).parent
    carried = [package / "__init__.py", *(p for p in (package / "runtime").rglob("*") if p.is_file())]
    assert [n for n in names if n.startswith("torchserve_dag/")] == sorted(
        f"torchserve_dag/{p.relative_to(package).as_posix()}" for p in carried if p.suffix != ".pyc"
    )
    assert mar.name_and_version(built.path) == ("upper", "1.0")


def test_a_workflow_brings_its_functions_and_the_handlers_of_its_nodes(project: Path, write) -> None:
    write(
        "answer: {function: same, input: upper}\nupper: {handler: upper}",
        "def same(text: Text) -> Text: return text",
        more="serve: {workers: 2, batch: 4, delay_ms: 3, timeout_s: 7}",
    )
    built, *_ = build(Project(project), ["flow"]).built
    said = json.loads(mar.read_text(built.path, "build.json"))

    assert {"workflows/flow.yaml", "workflows/flow.py", "handlers/upper.py"} < set(entries(built.path))
    assert "handlers/words.py" not in entries(built.path)
    assert said["kind"] == "workflow"
    assert said["file"] == "workflows/flow.yaml"
    assert said["card"]["handlers"]["upper"]["does"] == "A small model for tests."
    assert said["graph"].startswith("flowchart")
    assert yaml.safe_load(mar.read_text(built.path, "model-config.yaml")) == {
        "minWorkers": 2,
        "maxWorkers": 2,
        "batchSize": 4,
        "jobQueueSize": 200,
        "maxBatchDelay": 3,
        "responseTimeout": 17,
        "startupTimeout": 300,
    }


def test_an_unpacked_archive_is_imported_without_this_package(project: Path, tmp_path: Path) -> None:
    (built,) = build(Project(project), ["upper"]).built
    with zipfile.ZipFile(built.path) as archive:
        archive.extractall(tmp_path / "unpacked")
    code = (
        "import sys, serve; "
        "own = [m.__file__ for n, m in sys.modules.items() if n.startswith('torchserve_dag') and m.__file__]; "
        "assert own and all('unpacked' in file for file in own), own; "
        "assert not {'typer', 'httpx', 'grpc', 'model_archiver'} & set(sys.modules)"
    )

    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "unpacked", check=True, timeout=500)


def test_the_stamp_says_what_an_archive_was_built_from(project: Path) -> None:
    weigh(project, line(sha256=DIGEST))
    (built,) = build(Project(project), ["upper"]).built
    said = json.loads(mar.read_text(built.path, "build.json"))["inputs"]

    assert said["weights"] == {"limit.txt": DIGEST}
    assert said["packages"]["torchserve"] == "0.12.0"
    assert said["commit"] == "unknown"


def test_the_commit_says_when_files_differ_from_it(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)  # noqa: S607

    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    clean = stamp.commit(tmp_path)
    (tmp_path / "a").write_text("2")

    assert len(clean) == 40
    assert stamp.commit(tmp_path) == f"{clean}+uncommitted"


def test_weights_that_are_not_here_leave_a_handler_out_unless_it_is_asked_for(project: Path) -> None:
    weigh(project, line(sha256=DIGEST, get="scripts/weights limit"), there=False)
    report = build(Project(project))

    assert [b.name for b in report.built] == ["words"]
    assert [left.name for left in report.left_out] == ["upper"]
    assert not report.problems
    assert "upper.yaml:10: there are no weights" in str(report.left_out[0].reasons[0])
    assert "help: get them with: scripts/weights limit" in sentences(build(Project(project), ["upper"]))


def test_weights_without_a_digest_are_refused_with_the_digest_to_write(project: Path) -> None:
    weigh(project, line())
    report = build(Project(project))

    assert f"help: write sha256: {DIGEST}" in sentences(report)
    assert not (project / "model_store" / "upper-1.0.mar").exists()


def test_other_weights_than_the_card_says_are_refused(project: Path) -> None:
    weigh(project, line(sha256="0" * 64))

    assert f"limit.txt: its sha256 is {DIGEST}, and the card says 000" in sentences(build(Project(project)))


def test_a_wrong_or_missing_digest_names_the_option_that_writes_it(project: Path) -> None:
    weigh(project, line())
    missing = sentences(build(Project(project)))
    weigh_again(project, line(), line(sha256="0" * 64))

    assert "torchserve-dag build --update-cards" in missing
    assert "torchserve-dag build --update-cards" in sentences(build(Project(project)))


@pytest.mark.parametrize("sha256", ["", "sha256:", 'sha256: "old"', f"sha256: {'0a' * 32}  # of the last training"])
def test_a_card_is_updated_and_nothing_else_in_its_file(project: Path, sha256: str) -> None:
    weigh(project, "# trained here\n      file: limit.txt\n      source: by hand\n      licence: CC0  # ours")
    path = project / "handlers" / "upper.yaml"
    before = path.read_text()
    path.write_text(before + (f"      {sha256}\n" if sha256 else ""))
    report = build(Project(project), update_cards=True)

    assert [(card.file, card.weights, card.sha256) for card in report.updated] == [(str(path), "limit.txt", DIGEST)]
    assert sorted(b.name for b in report.built) == ["upper", "words"]
    comment = "  # of the last training" if "#" in sha256 else ""
    assert path.read_text() == f"{before}      sha256: {DIGEST}{comment}\n"
    assert build(Project(project), update_cards=True).updated == []


def test_a_card_in_braces_is_updated_too(project: Path) -> None:
    weigh(project, "{file: limit.txt, source: by hand, licence: CC0, get: make limit}")
    build(Project(project), update_cards=True)

    assert f"licence: CC0, sha256: {DIGEST}, get: make limit}}" in (project / "handlers" / "upper.yaml").read_text()


def test_a_card_that_cannot_be_edited_is_left_as_it_is(project: Path) -> None:
    old = "{file: limit.txt, source: by hand, licence: CC0, sha256: "
    weigh(project, f"{old}&old aaa}}\n    - {old}*old}}")
    path = project / "handlers" / "upper.yaml"
    before = path.read_text()

    assert f"help: write sha256: {DIGEST} there" in sentences(build(Project(project), ["upper"], update_cards=True))
    assert path.read_text() == before


def test_weights_outside_the_folder_are_refused(project: Path) -> None:
    weigh(project, line(sha256=DIGEST).replace("limit.txt", "../limit.txt"))

    assert '"../limit.txt" is not below weights/' in sentences(build(Project(project)))


def test_a_version_never_changes(project: Path) -> None:
    first = build(Project(project), ["upper"]).built[0].path.read_bytes()
    again = build(Project(project), ["upper"])
    code = project / "handlers" / "upper.py"
    code.write_text(code.read_text() + "\n# changed\n")
    changed = build(Project(project), ["upper"])

    assert again.built[0].state == "unchanged"
    assert "upper.yaml:2: upper-1.0.mar is already built from other input" in sentences(changed)
    assert "give it a new version, or --force" in sentences(changed)
    assert (project / "model_store" / "upper-1.0.mar").read_bytes() == first
    assert build(Project(project), ["upper"], force=True).built[0].state == "replaced"
    assert sorted(p.name for p in (project / "model_store").iterdir()) == ["upper-1.0.mar"]


@pytest.fixture
def rebuilt(project: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """Builds everything again, after what is carried, or what is installed, has changed since the first time."""

    def build_again(*, runtime: bytes = b"", packages: dict[str, str] | None = None, force: bool = False) -> Report:
        carried = contents.runtime()
        if runtime:
            carried["torchserve_dag/runtime/messages.py"] += runtime
        monkeypatch.setattr(contents, "runtime", carried.copy)
        installed = stamp.packages() | (packages or {})
        monkeypatch.setattr(stamp, "packages", installed.copy)
        return build(Project(project), force=force)

    return build_again


def test_a_version_stays_as_it_is_when_the_runtime_changes(project: Path, rebuilt: Callable[..., Report]) -> None:
    (first, _) = build(Project(project)).built
    content = first.path.read_bytes()
    report = rebuilt(runtime=b"# changed", packages={"torchserve-dag": "0.2.0"})

    assert not report.problems
    assert {built.state for built in report.built} == {"kept"}
    assert report.built[0].note == (
        f"built with an earlier runtime (torchserve-dag {metadata.version('torchserve-dag')}), which it carries: "
        "to build it again, give it a new version, or --force if it is neither served nor decided on"
    )
    assert first.path.read_bytes() == content
    assert {built.state for built in rebuilt(runtime=b"# changed", force=True).built} == {"replaced"}
    assert {built.state for built in rebuilt(runtime=b"# changed").built} == {"kept"}, "twice as much has changed"


def test_a_version_stays_as_it_is_when_packages_change(project: Path, rebuilt: Callable[..., Report]) -> None:
    build(Project(project))
    report = rebuilt(packages={"pillow": "99.0", "transformers": "99.1"})

    assert not report.problems
    assert {built.state for built in report.built} == {"kept"}
    assert re.match(
        r"built with other packages \(pillow [\d.]+, now 99\.0; transformers [\d.]+, now 99\.1\): to build it again",
        report.built[0].note,
    )


def test_a_version_stays_as_it_is_when_only_the_control_plane_changes(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes the settings of TorchServe, and what the archive says about itself."""
    build(Project(project))
    monkeypatch.setattr(contents, "served_as", lambda *_: {mar.ENTRY: b"# other", mar.SETTINGS: b"minWorkers: 1"})
    report = build(Project(project))

    assert not report.problems
    assert {built.state for built in report.built} == {"kept"}
    assert report.built[0].note.startswith("built by an earlier torchserve-dag ")


def test_changed_input_is_refused_whatever_else_has_changed(project: Path, rebuilt: Callable[..., Report]) -> None:
    build(Project(project))
    code = project / "handlers" / "upper.py"
    code.write_text(code.read_text() + "\n# changed\n")
    report = rebuilt(runtime=b"# changed", packages={"pillow": "99.0"})

    assert "upper-1.0.mar is already built from other input" in sentences(report)
    assert [built.name for built in report.built] == ["words"]


def test_an_export_stays_as_it_is_when_the_runtime_changes(
    project: Path, write: Write, monkeypatch: pytest.MonkeyPatch, rebuilt: Callable[..., Report]
) -> None:
    write("answer: {handler: upper}")
    build(Project(project))
    monkeypatch.setattr(war, "SPEC", "other.yaml")  # as if another version wrote it
    report = rebuilt(runtime=b"# changed")

    states = {built.path.name: built.state for built in report.built}
    assert not report.problems
    assert states["flow-1.0.war"] == states["flow-1.0-answer.mar"] == "kept"


def test_an_export_of_changed_input_is_refused(project: Path, write: Write) -> None:
    path = write("answer: {handler: upper}")
    build(Project(project))
    (project / "model_store" / "flow-1.0.mar").unlink()
    path.write_text(path.read_text().replace("does:", "serve: {batch: 3}\ndoes:"))

    assert "flow-1.0-answer.mar is already built from other input" in sentences(build(Project(project), ["flow"]))


COUNT_WORDS = Path(__file__).parents[1] / "data" / "count_words-1.0.mar"
"""A workflow of functions, built by this package before it had a protocol (commit 2018961)."""


def test_an_archive_that_speaks_no_protocol_is_refused_by_a_host() -> None:
    assert protocol.why_not_hosted(COUNT_WORDS) == (
        "count_words 1.0 speaks no protocol (it was built before there were protocols), and a host of this torchserve-dag "
        "needs protocol 4: build it again under a new version, or let TorchServe serve it as it is."
    )


def test_an_archive_built_today_says_which_protocol_it_speaks(project: Path) -> None:
    (built,) = build(Project(project), ["upper"]).built
    said = json.loads(mar.read_text(built.path, "build.json"))

    assert said["protocol"] == protocol.PROTOCOL
    assert protocol.why_not_hosted(built.path) is None
    assert "speaks protocol 1, and" in str(protocol.why_not_spoken(said | {"protocol": 1}))


def test_an_archive_of_somebody_elses_is_hosted_and_a_file_that_is_none_is_not(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.mar", "w") as packed:
        packed.writestr("MAR-INF/MANIFEST.json", "{}")
    (tmp_path / "none.mar").write_text("no archive")

    assert protocol.why_not_hosted(tmp_path / "other.mar") is None
    assert "none.mar cannot be read" in str(protocol.why_not_hosted(tmp_path / "none.mar"))


def test_a_name_means_all_of_its_versions_and_name_slash_version_one(project: Path) -> None:
    newer = (project / "handlers" / "upper.yaml").read_text().replace('"1.0"', '"2.0"') + "code: upper.py\n"
    (project / "handlers" / "upper-2.0.yaml").write_text(newer)

    assert [b.version for b in build(Project(project), ["upper/2.0"]).built] == ["2.0"]
    assert sorted(b.version for b in build(Project(project), ["upper"]).built) == ["1.0", "2.0"]


def test_a_misspelt_name_gets_a_hint(project: Path) -> None:
    assert 'did you mean "upper"?' in sentences(build(Project(project), ["uper"]))


def test_two_files_of_one_name_and_version_are_refused(project: Path) -> None:
    shutil.copy(project / "handlers" / "upper.yaml", project / "handlers" / "upper-again.yaml")

    assert "upper 1.0 is" in sentences(build(Project(project)))


def test_a_handler_without_a_card_is_refused(project: Path) -> None:
    (project / "handlers" / "bare.yaml").write_text('name: bare\nversion: "1.0"\n')

    assert 'bare.yaml:1: "card" is missing' in sentences(build(Project(project)))


def test_a_folder_of_weights_has_the_digest_of_its_sha256sum_lines(tmp_path: Path) -> None:
    (tmp_path / "model" / "sub").mkdir(parents=True)
    (tmp_path / "model" / "b.bin").write_bytes(b"b")
    (tmp_path / "model" / "sub" / "a.bin").write_bytes(b"a")
    (tmp_path / "model" / ".lock").write_bytes(b"a tool's")
    by_hand = "cd model && find * -type f | xargs sha256sum | LC_ALL=C sort | sha256sum"
    shown = subprocess.run(["bash", "-c", by_hand], cwd=tmp_path, check=True, capture_output=True, text=True).stdout  # noqa: S607

    assert sha256(tmp_path / "model") == shown.split()[0]


def test_a_workflow_is_exported_with_an_archive_for_each_of_its_models(project: Path, write) -> None:
    write("""
        upper: {handler: upper}
        between: {function: same, input: upper}
        again: {handler: upper, input: between}
        answer: {function: same, input: again}
    """, "def same(text: Text) -> Text: return text")  # fmt: skip
    report = build(Project(project), ["flow"])
    store = project / "workflow_store"
    spec = yaml.safe_load(mar.read_text(store / "flow-1.0.war", "workflow.yaml"))

    assert sorted(p.name for p in store.iterdir()) == ["flow-1.0-again.mar", "flow-1.0-upper.mar", "flow-1.0.war"]
    assert spec["dag"] == {"upper": ["again"]}
    assert spec["models"]["again"] == {"url": "flow-1.0-again.mar"}
    assert json.loads(mar.read_text(store / "flow-1.0-again.mar", "build.json"))["segment"] == "again"
    assert {one.state for one in report.built} == {"built"}
    assert {one.state for one in build(Project(project), ["flow"]).built} == {"unchanged"}


def test_the_same_workflow_is_exported_to_the_same_bytes(project: Path, write, tmp_path: Path) -> None:
    write("answer: {handler: upper}")
    stores = [tmp_path / name / "model_store" for name in ("one", "two")]
    for store in stores:
        build(Project(project), ["flow"], store=store)
    one, two = ({p.name: p.read_bytes() for p in (s.parent / "workflow_store").iterdir()} for s in stores)

    assert len(one) == 2
    assert one == two


def test_a_workflow_that_torchserves_engine_cannot_run_has_no_war_and_a_reason(project: Path, write) -> None:
    path = write("""
        one: {handler: upper}
        two: {handler: upper}
        answer: {function: both, inputs: {one: one, two: two}}
    """, "def both(one: Text, two: Text) -> Text: return one")  # fmt: skip
    report = build(Project(project), ["flow"])

    (reason,) = report.not_exported[0].reasons
    assert (reason.file, reason.line) == (str(path), 4)
    assert "starts with several models (one, two)" in reason.what
    assert [one.path.name for one in report.built] == ["flow-1.0.mar"]
    assert not report.problems


def test_a_workflow_of_torchserves_own_form_is_built_with_its_archives(project: Path) -> None:
    build(Project(project), ["upper"])
    (project / "workflows" / "native.yaml").write_text("models: {upper: {url: upper-1.0.mar}}\ndag: {upper: []}\n")
    (built,) = build(Project(project), ["native"]).built

    assert built.path.name == "native-1.0.mar"
    assert {"workflows/native.yaml", "workflows/upper-1.0.mar"} < set(entries(built.path))
