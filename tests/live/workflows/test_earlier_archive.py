"""An archive that an earlier version of this package built, served as it is beside the same workflow built today."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.live.conftest import ROOT, Serving, on_direct, on_torchserve
from torchserve_dag.clients import ModelNotFound, RequestRefused
from torchserve_dag.runtime.messages import Text
from torchserve_dag.runtime.worker.protocol import PROTOCOL
from torchserve_dag.server.status import about

EARLIER = ROOT / "tests" / "data" / "count_words-1.0.mar"
"""Built by commit 2018961, which had no folder `runtime/`, no `worker/protocol.py` and other names for everything."""


def inside(path: str) -> str:
    with zipfile.ZipFile(EARLIER) as archive:
        return archive.read(path).decode()


FILES: dict[str, str | Path] = {
    "model_store/count_words-1.0.mar": EARLIER,
    "workflows/count_words.py": inside("workflows/count_words.py").replace("torchserve_dag.messages", "torchserve_dag"),
    "workflows/count_words-2.0.yaml": inside("workflows/count_words.yaml")
    .replace('"1.0"', '"2.0"')
    .replace(", batches: 2", ""),  # a key that there was then
}


@on_torchserve
@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_an_archive_is_served_with_its_own_copy_of_the_package(server: Serving, version: str) -> None:
    with server.rest() as client:
        assert client.predict("count_words", Text("a b. c d e."), version=version) == {
            "sentences": 2,
            "words": [2, 3],
            "longest": "c d e",
        }
        with pytest.raises(RequestRefused, match=r"The text has no sentence") as refused:
            client.predict("count_words", Text("..."), version=version)

    assert refused.value.status == 422


@on_torchserve
def test_status_says_which_protocol_an_archive_speaks(server: Serving) -> None:
    with server.rest() as client:
        earlier, today = (about(client, "count_words", version) for version in ("1.0", "2.0"))

    assert str(earlier["protocol"]).startswith("count_words 1.0 speaks no protocol ")
    assert today["protocol"] == PROTOCOL


@on_direct
def test_the_direct_host_leaves_it_out_and_serves_the_rest(server: Serving) -> None:
    with server.rest() as client:
        assert client.predict("count_words", Text("a b. c d e."))["words"] == [2, 3]
        with pytest.raises(ModelNotFound):
            client.predict("count_words", Text("a b."), version="1.0")
