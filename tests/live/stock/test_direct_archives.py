"""What a stock TorchServe 0.12.0 gives a handler, and makes of its answers: the direct host's tests expect the same."""

from __future__ import annotations

import textwrap
import zipfile

import httpx
import pytest

from tests.foreign_archives import EXCHANGES, TOLD, Exchange, ask, check, manifest
from tests.live.stock.conftest import READY_S, Stock


@pytest.fixture(scope="module")
def told(stock: Stock) -> str:
    """The address of the archive that does what it is told."""
    with zipfile.ZipFile(stock.root / "model_store" / "m.mar", "w") as packed:
        packed.writestr("MAR-INF/MANIFEST.json", manifest())
        packed.writestr("handler.py", textwrap.dedent(TOLD))
    register = {"url": "m.mar", "initial_workers": 1, "synchronous": "true"}
    registered = httpx.post(f"{stock.management}/models", params=register, timeout=READY_S)
    assert registered.status_code == 200, registered.text
    return stock.inference


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda exchange: exchange.what)
def test_torchserve_answers_as_the_direct_host_does(told: str, exchange: Exchange) -> None:
    check(exchange, ask(told, "m", **exchange.send))
