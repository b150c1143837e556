"""Builds an index of a folder, or a new version of it: only what has changed is read and embedded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from torchserve_dag.retrieval.documents import Document, DocumentError, IndexingError, find
from torchserve_dag.retrieval.draft import IndexDraft
from torchserve_dag.retrieval.embedder import described
from torchserve_dag.retrieval.reader_process import ReaderProcess
from torchserve_dag.retrieval.splitting import split
from torchserve_dag.retrieval.versions import about_of, choose, delete_old, locked
from torchserve_dag.runtime.retrieval.folder import About, Indexed, IndexFolder

EMBEDDING = "text_embedding"
"""The handler that embeds, unless another is named."""
KEEP = 3

Progress = Callable[[str, int, int], None]
"""What is done, how many documents have been read, and how many are to be read."""


@dataclass(frozen=True, slots=True)
class IndexReport:
    """What an update has done."""

    index: str
    version: int
    """The version that answers now."""
    changed: bool
    """Whether it is a new one."""
    documents: int
    passages: int
    added: int
    """Documents that the version before did not have."""
    updated: int
    """Documents that have changed, or were embedded anew."""
    removed: int
    """Documents that are no longer there, or can no longer be read."""
    deleted_versions: list[int]
    """Old ones."""
    problems: list[str]
    """A sentence for each document that was left out."""
    others: dict[str, int]
    """How many files of other kinds there are, by their suffixes."""
    seconds: float


def update(
    root: Path,
    folder: Path,
    name: str,
    *,
    embedding: str = EMBEDDING,
    keep: int = KEEP,
    progress: Progress = lambda *_: None,
) -> IndexReport:
    """Index the documents in and below `folder` as `indexes/NAME` of the project at `root`.

    `embedding`: the handler that gives the vectors; `keep`: how many versions stay. Where nothing has changed there is
    no new version. Raises IndexingError, CheckError, OSError.
    """
    began, index = time.monotonic(), IndexFolder.of(root, name)
    handler, fingerprint = described(root, embedding)
    with locked(index):
        before = _before(index, _shown(root, folder))
        earlier = before.documents if before else {}
        progress("looking", 0, 0)
        found = find(folder)
        known = earlier if before and before.fingerprint == fingerprint else {}
        kept = {one.name: known[one.name] for one in found.documents if _unchanged(one, known)}
        with IndexDraft(root, index, embedding, before.width if before else 0) as draft:
            to_read = [one for one in found.documents if one.name not in kept]
            problems = [*found.problems, *_read(to_read, draft, progress)]
            new = draft.documents
            documents = dict(sorted({**kept, **new}.items()))
            if not documents:
                raise IndexingError(_nothing(folder, problems))
            if before and documents == known:
                about = before
            else:
                progress("writing", len(to_read), len(to_read))
                if before:
                    draft.copy(before.version, kept)
                passages = draft.finish()
                about = About(
                    name=name,
                    version=max([0, *index.versions()]) + 1,
                    created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    folder=_shown(root, folder),
                    embedding=handler,
                    fingerprint=fingerprint,
                    width=draft.width,
                    passages=passages,
                    documents=documents,
                )
                draft.publish(about)
                choose(index, about.version)
        changed = about is not before
        return IndexReport(
            index=name,
            version=about.version,
            changed=changed,
            documents=len(documents),
            passages=about.passages,
            added=len(new.keys() - earlier.keys()),
            updated=len(new.keys() & earlier.keys()),
            removed=len(earlier.keys() - documents.keys()),
            deleted_versions=delete_old(index, keep) if changed else [],
            problems=problems,
            others=dict(found.others),
            seconds=time.monotonic() - began,
        )


def _before(index: IndexFolder, folder: str) -> About | None:
    """The current version. Raises IndexingError if it is that of another folder."""
    version = index.current()
    if version is None:
        return None
    about = about_of(index, version)
    if about.folder != folder:
        what = f"The index {index.name} is that of {about.folder}, not of {folder}"
        raise IndexingError(f"{what}: choose another with --name, or delete {index.path}.")
    return about


def _shown(root: Path, folder: Path) -> str:
    """A folder from the project's root where it lies in the project."""
    here, top = folder.resolve(), root.resolve()
    return os.fspath(here.relative_to(top) if here.is_relative_to(top) else here)


def _unchanged(document: Document, known: Mapping[str, Indexed]) -> bool:
    return document.name in known and known[document.name].sha256 == document.sha256


def _read(documents: Sequence[Document], draft: IndexDraft, progress: Progress) -> list[str]:
    """Read and embed documents. Returns a sentence for each that cannot be read."""
    problems: list[str] = []
    with ReaderProcess() as reader:
        for done, document in enumerate(documents):
            progress("reading", done, len(documents))
            try:
                sections = reader.read(document)
            except DocumentError as error:
                problems.append(str(error))
            else:
                draft.add(document, split(sections))
        draft.embed()
    return problems


def _nothing(folder: Path, problems: Sequence[str]) -> str:
    what = f"{folder} has no document that can be indexed (Markdown, text, HTML, PDF); the index stays as it is."
    return " ".join([what, *problems[:1]])
