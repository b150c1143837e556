"""Which tests stay together where several processes run them: a file's, and a folder's that share a server."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist, which reads the groups in its own hook
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        whole = item.path.parent if item.path.parent.parent == TESTS / "live" else item.path
        item.add_marker(pytest.mark.xdist_group(str(whole.relative_to(TESTS))))
