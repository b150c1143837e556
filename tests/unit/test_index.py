"""Indexes of documents: what is read, what is embedded again, which version answers, and what is left out."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from fpdf import FPDF
from typer.testing import CliRunner

from torchserve_dag.commands import app
from torchserve_dag.retrieval import versions
from torchserve_dag.retrieval.documents import Document, DocumentError, IndexingError, find
from torchserve_dag.retrieval.reader_process import ReaderProcess
from torchserve_dag.retrieval.update import IndexReport, update
from torchserve_dag.runtime.retrieval.folder import IndexFolder
from torchserve_dag.runtime.retrieval.version import IndexVersion

EMBEDS = '''
"""Texts by their words: a vector of 64 counts. What was embedded is written down."""

import zlib
from dataclasses import dataclass
from pathlib import Path

from torchserve_dag import Embedding, Handler, InputError, Placement, Text


@dataclass(frozen=True)
class Settings:
    most: int = 1000


class Words(Handler[Text, list[str], list[float], Embedding]):
    Settings = Settings

    def load(self, folder: Path, settings: Settings, placement: Placement) -> None:
        self.most, self.log = settings.most, folder.parent / "embedded.txt"

    def example(self) -> Text:
        return Text("example")

    def preprocess(self, item: Text) -> list[str]:
        if len(item.text) > self.most:
            raise InputError("The text is too long.", 422)
        with self.log.open("a") as log:
            log.write(item.text.replace("\\n", " ") + "\\n")
        return "".join(one if one.isalnum() else " " for one in item.text.lower()).split()

    def infer(self, batch: list[list[str]]) -> list[list[float]]:
        vectors = [[0.01] * 64 for _ in batch]
        for vector, words in zip(vectors, batch, strict=True):
            for word in words:
                vector[zlib.crc32(word.encode()) % 64] += 1.0
        return vectors

    def postprocess(self, output: list[float], item: Text) -> Embedding:
        return Embedding(output)
'''
WORD = "word"
CARD = 'name: words\nversion: "1.0"\ncard: {does: a, input: b, output: c, limits: d, weights: []}\n'

Index = Callable[..., IndexReport]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with a handler that embeds, and a folder of two documents."""
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "words.py").write_text(EMBEDS)
    (tmp_path / "handlers" / "words.yaml").write_text(CARD)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "door.md").write_text(
        "# The door\n\nIt listens on port 8443.\n\n## Tokens\n\nA token is secret.\n"
    )
    (tmp_path / "notes" / "plain.txt").write_text("Nothing in particular stands here.\n")
    return tmp_path


@pytest.fixture
def index(root: Path) -> Index:
    def run(**more: object) -> IndexReport:
        return update(root, root / "notes", "notes", embedding="words", **more)

    return run


def embedded(root: Path) -> list[str]:
    """What was embedded since the last time, without the handler's own examples."""
    log = root / "embedded.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return [line for line in lines if line not in {"example", "passage"}]


def rows(root: Path, version: int) -> list[dict[str, object]]:
    table = IndexVersion.open(IndexFolder.of(root, "notes"), version).table
    return sorted(table.search().limit(10_000).to_list(), key=lambda row: (row["document"], row["begin"]))


def test_each_passage_has_its_place_in_its_document(root: Path, index: Index) -> None:
    report = index()
    found = rows(root, report.version)

    assert (report.version, report.documents, report.passages, report.added) == (1, 2, 3, 2)
    assert [(row["document"], row["heading"], row["line"]) for row in found] == [
        ("notes/door.md", "The door", 1),
        ("notes/door.md", "The door > Tokens", 5),
        ("notes/plain.txt", "", 1),
    ]
    for row in found:
        assert (root / str(row["document"])).read_text()[row["begin"] : row["end"]] == row["text"]


def test_only_what_changed_is_embedded_again(root: Path, index: Index) -> None:
    index()
    embedded(root)
    (root / "notes" / "plain.txt").write_text("Something stands here now.\n")
    (root / "notes" / "new.html").write_text("<h1>News</h1><p>A new page.</p>")
    report = index()

    assert sorted(embedded(root)) == ["News News  A new page.", "Something stands here now."]
    assert (report.version, report.added, report.updated, report.removed) == (2, 1, 1, 0)
    assert [row["document"] for row in rows(root, 2)] == ["notes/door.md"] * 2 + ["notes/new.html", "notes/plain.txt"]
    assert len(rows(root, 1)) == 3  # the version before is as it was


def test_without_a_change_there_is_no_new_version(root: Path, index: Index) -> None:
    """Not even a model is loaded; nor for a document that still cannot be read."""
    (root / "notes" / "broken.pdf").write_bytes(b"%PDF-1.4 not really")
    index()
    embedded(root)
    report = index()

    assert (report.version, report.changed, len(report.problems)) == (1, False, 1)
    assert embedded(root) == []
    assert not (root / "embedded.txt").exists()


def test_a_document_that_is_gone_is_in_the_next_version_no_more(root: Path, index: Index) -> None:
    index()
    (root / "notes" / "door.md").unlink()
    report = index()

    assert (report.version, report.removed, report.passages) == (2, 1, 1)
    assert [row["document"] for row in rows(root, 2)] == ["notes/plain.txt"]


def test_a_folder_that_is_suddenly_empty_leaves_the_index_as_it_is(root: Path, index: Index) -> None:
    """A disk that is not mounted, for example."""
    index()
    shutil.rmtree(root / "notes")
    (root / "notes").mkdir()

    with pytest.raises(IndexingError, match=r"has no document that can be indexed.*the index stays as it is"):
        index()
    assert IndexFolder.of(root, "notes").current() == 1


def test_another_model_embeds_all_documents_again(root: Path, index: Index) -> None:
    index()
    embedded(root)
    (root / "handlers" / "words.yaml").write_text(f"{CARD}settings: {{most: 999}}\n")
    report = index()

    assert (report.version, report.updated) == (2, 2)
    assert len(embedded(root)) == 3


def test_what_is_too_long_for_the_model_is_halved(root: Path, index: Index) -> None:
    (root / "handlers" / "words.yaml").write_text(f"{CARD}settings: {{most: 40}}\n")
    text = "The first sentence is here. The second one is there. The third one is far away."
    (root / "notes" / "plain.txt").write_text(text)
    index()
    parts = [row for row in rows(root, 1) if row["document"] == "notes/plain.txt"]

    assert len(parts) > 1
    assert all(len(str(row["searched"])) <= 40 for row in parts)
    assert "".join("".join(str(row["text"]) for row in parts).split()) == "".join(text.split())


def test_a_rollback_is_followed_by_a_version_that_was_never_there(root: Path, index: Index) -> None:
    index()
    (root / "notes" / "plain.txt").write_text("Version two.")
    index()
    versions.rollback(root, "notes", 1)

    assert IndexFolder.of(root, "notes").current() == 1
    report = index()
    assert (report.version, report.updated) == (3, 1)
    with pytest.raises(IndexingError, match=r"The index notes has no version 9: it has 1, 2, 3\."):
        versions.rollback(root, "notes", 9)


def test_old_versions_are_deleted_and_the_current_one_never(root: Path, index: Index) -> None:
    for number in range(4):
        (root / "notes" / "plain.txt").write_text(f"Version {number}.")
        report = index(keep=2)
    there = IndexFolder.of(root, "notes").versions()
    versions.rollback(root, "notes", 3)
    versions.delete_old(IndexFolder.of(root, "notes"), 1)

    assert (there, report.deleted_versions) == ([3, 4], [2])
    assert IndexFolder.of(root, "notes").versions() == [3, 4]


def test_what_cannot_be_indexed_is_named_in_a_sentence_and_the_rest_goes_on(root: Path, index: Index) -> None:
    notes = root / "notes"
    (notes / "broken.pdf").write_bytes(
        b"%PDF-1.7\n1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj\ntrailer <</Root 1 0 R>>"
    )
    (notes / "cut.pdf").write_bytes(pdf(["A page."])[:400])
    (notes / "empty.md").write_text(" \n")
    (notes / "image.md").write_bytes(bytes(range(256)) * 10)
    (notes / "latin.html").write_bytes("<meta charset=koi8-r><p>Привет</p>".encode("koi8-r"))
    (notes / "old.txt").write_bytes("café".encode("latin-1"))
    with (notes / "huge.txt").open("wb") as file:
        file.truncate(100_000_000)
    (notes / "outside.md").symlink_to("/etc/hostname")
    (notes / "logo.png").write_bytes(b"\x89PNG")
    (notes / ".hidden.md").write_text("Not to be found.")
    report = index()

    told = {problem.partition(" ")[0]: problem.partition(" ")[2] for problem in report.problems}
    assert told.pop("notes/broken.pdf").startswith("is no PDF that can be read: ")
    assert told.pop("notes/cut.pdf").startswith("is no PDF that can be read: ")
    assert told == {
        "notes/empty.md": "has no text.",
        "notes/image.md": "is no text in UTF-8: convert it, or give it another suffix.",
        "notes/old.txt": "is no text in UTF-8: convert it, or give it another suffix.",
        "notes/huge.txt": "has 100 MB, and the limit is 32 MB: split it into several documents.",
        "notes/outside.md": "is a link that leads out of the folder: put the document itself there.",
    }
    assert report.others == {".png": 1}
    assert {row["document"]: row["text"] for row in rows(root, 1)}["notes/latin.html"] == "Привет"
    assert report.documents == 3


def pdf(pages: list[str], **more: str) -> bytes:
    document = FPDF()
    document.set_font("helvetica", size=12)
    for text in pages:
        document.add_page()
        document.multi_cell(0, text=text)
    if more:
        document.set_encryption(**more)
    return bytes(document.output())


def test_a_passage_of_a_pdf_names_its_page(root: Path, index: Index) -> None:
    (root / "notes" / "two.pdf").write_bytes(pdf(["The first page.", "The second page."]))
    (root / "notes" / "scan.pdf").write_bytes(pdf([""]))
    (root / "notes" / "secret.pdf").write_bytes(pdf(["Secret."], owner_password=WORD, user_password=WORD))
    report = index()
    found = [(row["text"], row["page"], row["line"]) for row in rows(root, 1) if row["document"] == "notes/two.pdf"]

    assert found == [("The first page.", 1, 1), ("The second page.", 2, 1)]
    assert report.problems == [
        "notes/scan.pdf has no text: scanned pages must be turned into text first.",
        "notes/secret.pdf is encrypted: save it without its password.",
    ]


def test_a_reader_that_hangs_or_dies_costs_one_document(root: Path) -> None:
    os.mkfifo(root / "pipe.md")  # whoever reads it waits for ever
    good = Document("notes/plain.txt", root / "notes" / "plain.txt", "text", "")
    pipe = Document("pipe.md", root / "pipe.md", "markdown", "")
    hangs = pytest.raises(DocumentError, match=r"^pipe.md takes longer than 0.5 s to read: left out\.$")
    with ReaderProcess(limit_s=0.5) as reader, hangs:
        reader.read(pipe)
    with ReaderProcess() as reader:
        assert reader.read(good)
        assert reader._running is not None
        process, _ = reader._running
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with pytest.raises(DocumentError, match=r"cannot be read within 2 GB of memory: left out\.$"):
            reader.read(good)
        assert reader.read(good)


def test_an_index_of_another_folder_is_not_overwritten(root: Path, index: Index) -> None:
    index()
    shutil.copytree(root / "notes", root / "others")

    with pytest.raises(IndexingError, match="The index notes is that of notes, not of others: choose another"):
        update(root, root / "others", "notes", embedding="words")


def test_one_process_at_a_time_changes_an_index(root: Path, index: Index) -> None:
    index()
    with (root / "indexes" / "notes" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(IndexingError, match="Another process changes the index notes now"):
            index()


def test_what_an_ended_run_left_half_done_is_deleted(root: Path, index: Index) -> None:
    half = root / "indexes" / "notes" / ".new.part"
    half.mkdir(parents=True)
    index()

    assert not half.exists()
    assert IndexFolder.of(root, "notes").versions() == [1]


def test_a_handler_that_embeds_nothing_is_refused(root: Path) -> None:
    (root / "handlers" / "words.py").write_text(
        textwrap.dedent("""
        from torchserve_dag import Handler, Text
        class Upper(Handler[Text, str, str, Text]):
            def load(self, folder, settings, placement): pass
            def example(self) -> Text: return Text("a")
            def preprocess(self, item: Text) -> str: return item.text
            def infer(self, batch): return batch
            def postprocess(self, output: str, item: Text) -> Text: return Text(output)
        """)
    )
    with pytest.raises(IndexingError, match="words embeds no texts: name a handler that takes a Text"):
        update(root, root / "notes", "notes", embedding="words")


def test_the_documents_of_a_folder_are_found_without_its_links(root: Path) -> None:
    (root / "notes" / "loop").symlink_to(root / "notes")

    assert [one.name for one in find(root / "notes").documents] == ["notes/door.md", "notes/plain.txt"]


def test_the_command_builds_lists_and_rolls_back(root: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["index", *arguments, "--project", str(root)])
        assert result.exit_code == 0, result.output
        return result.output

    built = run(str(root / "notes"), "--embedding", "words")
    (root / "notes" / "plain.txt").write_text("Changed.")
    run(str(root / "notes"), "--embedding", "words", "--json")

    assert built.startswith("built notes, version 1: 2 documents in 3 passages; 2 added, 0 updated, 0 removed")
    assert [line.split()[:3] for line in run("--list").splitlines()[1:]] == [
        ["notes", "1", versions.states(root)[0].created[:10]],
        ["notes", "2", "answers"],
    ]
    assert run("--rollback", "1").startswith("version 1 of notes answers: 2 documents")
    assert [one.current for one in versions.states(root)] == [True, False]


def test_the_command_says_what_it_cannot_do(root: Path) -> None:
    def fails(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["index", *arguments, "--project", str(root)])
        assert result.exit_code == 1
        return " ".join(result.output.split())

    assert "Name the folder of the documents" in fails()
    assert "is no folder" in fails(str(root / "nowhere"))
    assert '"My notes" is no name for an index' in fails(str(root / "notes"), "--name", "My notes")
    assert "There is no index" in fails("--list")
    assert 'there is no handler "other"' in fails(str(root / "notes"), "--embedding", "other")
