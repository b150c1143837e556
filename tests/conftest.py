"""Which tests stay in one process where several run them: a file's, and those of a folder that shares a server."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    # --dist=loadgroup of xdist 3.8 would do, but it writes the group into Item._nodeid, which pytest 9.2 does not read.
    from xdist.scheduler import LoadScopeScheduling

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return whole(nodeid)

    return WholeFiles(config, log)


def whole(nodeid: str) -> str:
    """The file of a test, or its folder where the folder's files share a server: `tests/live/FOLDER`."""
    file = nodeid.partition("::")[0]
    parts = file.split("/")
    return "/".join(parts[:3]) if parts[:2] == ["tests", "live"] and len(parts) > 3 else file
