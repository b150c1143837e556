"""Searching an index while it changes: by meaning and by words, the current version, and what happens without one."""

from __future__ import annotations

import os
import shutil
import zlib
from pathlib import Path

import pytest

from tests.unit.test_index import CARD, EMBEDS
from torchserve_dag import Embedding, PassageIndex, Passages, Query, SearchSettings, Workflow
from torchserve_dag.archives.build import build
from torchserve_dag.retrieval import versions
from torchserve_dag.retrieval.update import update
from torchserve_dag.runtime.data import plain
from torchserve_dag.runtime.engine.item_span import _of_answer
from torchserve_dag.runtime.engine.span import Span
from torchserve_dag.runtime.messages import Failure, InputError, OverloadedError
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.retrieval import passage_index
from torchserve_dag.runtime.retrieval.fusion import fused
from torchserve_dag.runtime.worker.protocol import ServiceRequest
from torchserve_dag.runtime.worker.service import load

HANDLERS = Path(__file__).parents[2] / "handlers"

NOTES = {
    "door.md": "# The door\n\nThe front door listens on port 8443.\n",
    "cake.md": "# Cake\n\nStir the flour, then bake it. The oven is hot.\n",
    "hebrew.md": "# עברית\n\nהדלת הקדמית מאזינה לפורט.\n",
    "arabic.md": "الباب الأمامي يستمع إلى المنفذ.\n",
    "japanese.md": "玄関のドアはポートを開いています。\n",
    "accents.md": "Le café est très bon.\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "handlers").mkdir()
    (tmp_path / "handlers" / "words.py").write_text(EMBEDS)
    (tmp_path / "handlers" / "words.yaml").write_text(CARD)
    for suffix in (".py", ".yaml"):
        shutil.copyfile(HANDLERS / f"passage_search{suffix}", tmp_path / "handlers" / f"passage_search{suffix}")
    (tmp_path / "docs").mkdir()
    for name, text in NOTES.items():
        (tmp_path / "docs" / name).write_text(text)
    make(tmp_path)
    return tmp_path


def make(root: Path) -> None:
    update(root, root / "docs", "docs", embedding="words")


@pytest.fixture(autouse=True)
def _looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a second only: the tests do not wait."""
    monkeypatch.setattr(passage_index, "CHECK_S", 0.0)


def query(text: str) -> Query:
    """With the vector that the handler `words` gives."""
    vector = [0.01] * 64
    for word in "".join(one if one.isalnum() else " " for one in text.lower()).split():
        vector[zlib.crc32(word.encode()) % 64] += 1.0
    return Query(text, Embedding(vector))


def search(root: Path, text: str, **settings: object) -> Passages:
    return PassageIndex(root, SearchSettings("docs", **settings)).search(query(text))


@pytest.mark.parametrize("mode", ["vectors", "text", "both"])
def test_each_mode_finds_the_passage_and_says_where_it_stands(root: Path, mode: str) -> None:
    found = search(root, "Where listens the front door?", mode=mode, passages=2)
    first = found.passages[0]

    assert (found.index, found.version) == ("docs", 1)
    assert (first.document, first.heading, first.line, first.page) == ("docs/door.md", "The door", 1, None)
    assert NOTES["door.md"][first.begin : first.end] == first.text
    assert 0.3 < first.similarity < 1


@pytest.mark.parametrize(
    ("words", "document"),
    [
        ("הדלת", "hebrew"),
        ("الباب", "arabic"),
        ("ドア", "japanese"),
        ("cafe", "accents"),
        ("CAFÉ", "accents"),
        ("baking", "cake"),
        ("8443", "door"),
    ],
)
def test_words_of_every_script_are_found(root: Path, words: str, document: str) -> None:
    """Right to left, without spaces, without accents, in another form of the word."""
    assert [one.document for one in search(root, words, mode="text").passages] == [f"docs/{document}.md"]


@pytest.mark.parametrize("words", ['"', "AND OR NOT", "a:b^2 ~ * ( [", "\0", "😀", "the", "'; DROP TABLE passages; --"])
def test_words_have_no_syntax(root: Path, words: str) -> None:
    assert len(search(root, words, mode="both").passages) == 4
    assert search(root, words, mode="text").passages == []


def test_what_is_too_far_away_is_left_out_in_each_mode(root: Path) -> None:
    for mode in ("vectors", "text", "both"):
        near = search(root, "Stir the flour, then bake it.", mode=mode, least_similarity=0.5)
        assert [one.document for one in near.passages] == ["docs/cake.md"]
        assert search(root, "oven quantum fugue", mode=mode, least_similarity=0.9).passages == []


def test_reciprocal_ranks_are_fused() -> None:
    """What both have comes before what one has first; of equals, the first ranking's first."""
    assert fused([["a", "b", "c"], ["d", "b", "e"]]) == ["b", "a", "d", "c", "e"]
    assert fused([[], ["x"]]) == ["x"]


def test_a_new_version_answers_without_a_restart_and_so_does_an_old_one(root: Path) -> None:
    index = PassageIndex(root, SearchSettings("docs", mode="text"))
    before = index.search(query("window"))
    (root / "docs" / "window.md").write_text("The window is open.")
    make(root)
    after = index.search(query("window"))
    versions.rollback(root, "docs", 1)
    back = index.search(query("window"))

    assert [(one.version, len(one.passages)) for one in (before, after, back)] == [(1, 0), (2, 1), (1, 0)]


def test_which_version_is_current_is_looked_up_once_a_second(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_index, "CHECK_S", 3600.0)
    index = PassageIndex(root, SearchSettings("docs"))
    index.search(query("door"))
    (root / "docs" / "cake.md").unlink()
    make(root)
    late = index.search(query("door")).version
    index._checked -= 3600.0

    assert (late, index.search(query("door")).version) == (1, 2)


def test_an_index_that_is_deleted_is_503_until_it_is_back(root: Path) -> None:
    index = PassageIndex(root, SearchSettings("docs"))
    index.search(query("door"))
    shutil.rmtree(root / "indexes")
    with pytest.raises(OverloadedError, match=r"^There is no index docs; its server's owner makes it with") as raised:
        index.search(query("door"))
    make(root)

    assert raised.value.status == 503
    assert index.search(query("door")).passages[0].document == "docs/door.md"


def test_an_index_that_vanishes_between_two_looks_is_503(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_index, "CHECK_S", 3600.0)
    index = PassageIndex(root, SearchSettings("docs", mode="vectors"))
    index.search(query("door"))
    shutil.rmtree(root / "indexes")

    with pytest.raises(OverloadedError, match="There is no index docs"):
        index.search(query("door"))


def test_a_version_that_was_deleted_gives_way_to_the_current_one(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passage_index, "CHECK_S", 3600.0)
    index = PassageIndex(root, SearchSettings("docs", mode="vectors"))
    index.search(query("door"))
    (root / "docs" / "cake.md").unlink()
    make(root)
    shutil.rmtree(root / "indexes" / "docs" / "1")

    assert index.search(query("door")).version == 2


def test_a_damaged_version_is_503_and_names_the_way_back(root: Path) -> None:
    (root / "docs" / "cake.md").unlink()
    make(root)
    index = PassageIndex(root, SearchSettings("docs"))
    shutil.rmtree(root / "indexes" / "docs" / "2" / "passages.lance")
    with pytest.raises(OverloadedError, match=r"version 2, cannot be read; .*--name docs --rollback VERSION"):
        index.search(query("door"))
    versions.rollback(root, "docs", 1)

    assert index.search(query("door")).version == 1


def test_a_vector_of_another_model_is_refused(root: Path) -> None:
    index = PassageIndex(root, SearchSettings("docs"))

    with pytest.raises(InputError, match=r"vector has 2 numbers, and those of the index docs have 64: .* words/1\.0"):
        index.search(Query("door", Embedding([1.0, 0.0])))
    with pytest.raises(InputError, match="8,193 characters; the limit is 8,192"):
        index.search(query("d" * 8_193))


def test_a_forked_process_is_refused_instead_of_hanging(root: Path) -> None:
    index = PassageIndex(root, SearchSettings("docs"))
    index.search(query("door"))
    opened = index._opened
    assert opened is not None
    object.__setattr__(opened[1], "pid", os.getpid() + 1)

    with pytest.raises(RuntimeError, match="opened before its process was forked"):
        opened[1].search(query("door"), index.settings)


def test_the_handler_answers_a_batch_and_names_the_version(root: Path) -> None:
    settings = "least_similarity: 0.25"
    path = root / "handlers" / "passage_search.yaml"
    path.write_text(path.read_text().replace(settings, "least_similarity: 0.2"))
    spans: list[Span] = []
    with Workflow.load(path) as handler:
        handler.engine._observer = spans.extend
        found, nothing, blank = handler([query("Where listens the front door?"), query("quantum"), query(" ")])

    assert found.passages[0].document == "docs/door.md"
    told = [one.attributes for one in spans if "gen_ai.data_source.id" in one.attributes]
    assert len(told) == 2
    assert any(found.span_attributes().items() <= attributes.items() for attributes in told)
    assert found.span_attributes() == {
        "gen_ai.data_source.id": "docs/1",
        "passages": len(found.passages),
        "similarity": max(one.similarity for one in found.passages),
    }
    assert (nothing, nothing.span_attributes()["passages"]) == (Passages([], "docs", 1), 0)
    assert blank.message == "The question is blank; send at least a word."


def test_the_handler_loads_without_an_index_and_answers_once_it_is_there(root: Path) -> None:
    shutil.rmtree(root / "indexes")
    with Workflow.load(root / "handlers" / "passage_search.yaml") as handler:
        (before,) = handler([query("front door")])
        make(root)
        (after,) = handler([query("The front door listens on port 8443.")])

    assert isinstance(before, Failure)
    assert before.status == 503
    assert after.passages[0].document == "docs/door.md"


def test_an_archive_finds_the_index_of_the_project_that_serves_it(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the state folder that every worker is told; or by a variable where nobody tells one."""
    report = build(Project(root), ["passage_search"])
    unpacked = tmp_path_factory.mktemp("unpacked")
    shutil.unpack_archive(report.built[0].path, unpacked, "zip")
    monkeypatch.chdir(unpacked)
    request = ServiceRequest("1", plain.to_json(query("The front door listens on port 8443.")), "application/json")

    def answer() -> int:
        service = load(unpacked, None)
        try:
            return service.submit(request).result(30).status
        finally:
            service.close()

    alone = answer()
    monkeypatch.setenv("TORCHSERVE_DAG_STATE", str(root / ".torchserve-dag"))
    served = answer()
    monkeypatch.delenv("TORCHSERVE_DAG_STATE")
    monkeypatch.setenv("TORCHSERVE_DAG_INDEXES", str(root / "indexes"))

    assert (alone, served, answer()) == (503, 200, 200)


def test_a_message_that_cannot_tell_of_itself_is_still_an_answer() -> None:
    class Raises:
        def span_attributes(self) -> dict[str, str]:
            raise ValueError("not now")

    assert _of_answer(Raises()) == {}
    assert _of_answer({"span_attributes": 1}) == {}
