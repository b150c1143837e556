"""One server on each host, with a front door, for the small workflows of all test files in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live.conftest import HOSTS, Serving, serve_files


@pytest.fixture(scope="package", params=HOSTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    yield from serve_files(request, tmp_path_factory.mktemp("modes"), request.param)
