"""An index that is searched while it changes: the version that is the current one answers."""

from __future__ import annotations

import logging
import threading
import time
from http import HTTPStatus
from pathlib import Path

from torchserve_dag.runtime import logs
from torchserve_dag.runtime.messages import InputError, OverloadedError, Passages, Query
from torchserve_dag.runtime.retrieval.folder import IndexFolder
from torchserve_dag.runtime.retrieval.settings import SearchSettings
from torchserve_dag.runtime.retrieval.version import IndexVersion

logger = logging.getLogger(__name__)

CHECK_S = 1.0
"""How often, at most, the disk is asked which version is the current one."""
MOST_CHARACTERS = 8_192
"""Of a query's text."""


class PassageIndex:
    """The passages of an index in the project's `indexes/`, for a handler that searches it.

        index = PassageIndex(folder.parent, settings)
        found = index.search(Query("Where does the front door listen?", embedding))

    Another version is found within a second of its choice. An index that is not there, or is deleted, is 503 until it
    is back.
    """

    def __init__(self, root: Path, settings: SearchSettings) -> None:
        """`root`: the project's folder, or that of an unpacked archive."""
        self.settings = settings
        self._folder = IndexFolder.of(root, settings.index)
        self._lock = threading.Lock()
        self._opened: tuple[tuple[int, int, int], IndexVersion] | None = None
        self._checked = float("-inf")

    @property
    def width(self) -> int | None:
        """How many numbers the vectors of the current version have; None where there is no version."""
        try:
            return self._version().about.width
        except OverloadedError:
            return None

    def search(self, query: Query) -> Passages:
        """The passages that fit a query best.

        Raises OverloadedError where there is no index, InputError for a query that cannot be looked for.
        """
        if len(query.text) > MOST_CHARACTERS:
            what = f"The query has {len(query.text):,} characters; the limit is {MOST_CHARACTERS:,}."
            raise InputError(what, HTTPStatus.UNPROCESSABLE_ENTITY)
        version = self._version()
        self._check_width(version, query)
        try:
            passages = version.search(query, self.settings)
        except Exception as error:  # noqa: BLE001 (a version may be deleted at any time; LanceDB raises RuntimeError)
            version = self._version(after=error)
            self._check_width(version, query)
            try:
                passages = version.search(query, self.settings)
            except Exception as again:  # noqa: BLE001
                raise self._broken(version.about.version, again) from None
        return Passages(passages, version.about.name, version.about.version)

    def _check_width(self, version: IndexVersion, query: Query) -> None:
        about, width = version.about, len(query.embedding.embedding)
        if width != about.width:
            what = f"The query's vector has {width} numbers, and those of the index {about.name} have {about.width}"
            raise InputError(f"{what}: embed it with {about.embedding}.", HTTPStatus.UNPROCESSABLE_ENTITY)

    def _version(self, after: Exception | None = None) -> IndexVersion:
        """The current version, opened; looked for anew after a search that failed. Raises OverloadedError."""
        with self._lock:
            now = time.monotonic()
            if after is not None:
                self._opened = None
            if self._opened is not None and now - self._checked < CHECK_S:
                return self._opened[1]
            self._checked = now
            version = self._folder.current()
            if version is None:
                self._opened = None
                raise OverloadedError(
                    f"There is no index {self._folder.name}; its server's owner makes it with: torchserve-dag index"
                )
            try:
                file = (self._folder.of_version(version) / "index.json").stat()
                stamp = (version, file.st_ino, file.st_mtime_ns)
                if self._opened is None or self._opened[0] != stamp:
                    self._opened = stamp, IndexVersion.open(self._folder, version)
                    logger.info("the index %s is searched in version %d", self._folder.name, version)
            except Exception as error:  # noqa: BLE001 (what a damaged file makes LanceDB raise has no common class)
                self._opened = None
                raise self._broken(version, error) from None
            return self._opened[1]

    def _broken(self, version: int, error: Exception) -> OverloadedError:
        logs.report(logger, error, f"the index {self._folder.path}, version {version}, cannot be read")
        return OverloadedError(
            f"The index {self._folder.name}, version {version}, cannot be read; its server's owner goes back to "
            f"another with: torchserve-dag index --name {self._folder.name} --rollback VERSION"
        )
