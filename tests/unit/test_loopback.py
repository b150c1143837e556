"""Which hosts are loopback."""

from __future__ import annotations

import pytest

from torchserve_dag.runtime.data.loopback import is_loopback


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.1.2.3", "127.255.255.255", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"]
)
def test_loopback_is_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "128.0.0.1", "::2", "127.example.com", "localhost.example.com", "", "127"],  # noqa: S104
)
def test_what_a_network_reaches_is_not(host: str) -> None:
    assert not is_loopback(host)
