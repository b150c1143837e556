"""Weights that an archive holds by reference: fetched once into a cache, verified, and linked where they are read."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from torchserve_dag.archives.build import build
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.project import weight_cache
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.runtime.project.weight_cache import FetchError, fetched, link_weights
from torchserve_dag.runtime.project.weight_files import sha256
from torchserve_dag.runtime.project.weight_sources import OpenedWeights
from torchserve_dag.runtime.worker.service import load

CONTENT = b"".join(b"%07d\n" % i for i in range(400_000))  # 3.2 MB, no two parts alike
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TORCHSERVE_DAG_CACHE", str(folder))
    return folder / "weights"


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of weights outside the project."""
    path = tmp_path_factory.mktemp("elsewhere") / "llm.gguf"
    path.write_bytes(CONTENT)
    return path


class WeightsServer(ThreadingHTTPServer):
    """An HTTP server of CONTENT, which can begin in the middle unless `ranges` is false."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.ranges = True
        self.breaks_after: int | None = None
        """Bytes after which the next connection is cut."""
        self.gate = threading.Event()
        """Opened, the second half of the content is sent."""
        self.gate.set()
        self.starts: list[int] = []
        """Of each request, the byte that it asked to begin at."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/llm.gguf"


class _Answer(BaseHTTPRequestHandler):
    server: WeightsServer

    def do_GET(self) -> None:
        if self.path != "/llm.gguf":
            self.send_error(404)
            return
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        self.server.starts.append(start)
        if asked and self.server.ranges:
            if start >= len(CONTENT):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            start = 0
            self.send_response(200)
        body = CONTENT[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.breaks_after is not None:
            body, self.server.breaks_after = body[: self.server.breaks_after], None
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        self.server.gate.wait(60)
        self.wfile.write(body[half:])

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[WeightsServer]:
    with WeightsServer() as serving:
        thread = threading.Thread(target=serving.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield serving
        serving.gate.set()
        serving.shutdown()
        thread.join()


def refer(project: Path, address: str, **more: str) -> None:
    """Give the handler `upper` weights by reference."""
    entry = {"file": "models/llm.gguf", "source": "made here", "licence": "CC0", "fetch_from": address, **more}
    path = project / "handlers" / "upper.yaml"
    path.write_text(path.read_text().replace("weights: []", f"weights:\n    - {json.dumps(entry)}"))


def unpacked(archive: Path, folder: Path) -> Path:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)
    return folder


def fetch_in_process(url: str) -> subprocess.Popen[str]:
    """Another process that fetches the weights, and prints their SHA-256 as it has them."""
    code = (
        "import sys; from torchserve_dag.runtime.project.weight_cache import fetched; "
        "from torchserve_dag.runtime.project.weight_files import sha256; "
        "print(sha256(fetched(*sys.argv[1:], 'llm.gguf')))"
    )
    command = [sys.executable, "-c", code, url, DIGEST]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(fact: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def waits_for_the_lock(process: subprocess.Popen[str]) -> bool:
    folder = Path(f"/proc/{process.pid}/fd")
    return any(file.is_symlink() and file.readlink().name == f"{DIGEST}.lock" for file in folder.iterdir())


def test_an_archive_holds_the_reference_and_a_worker_fetches_what_it_means(
    project: Path, elsewhere: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    refer(project, str(elsewhere), sha256=DIGEST)
    (built,) = build(Project(project), ["upper"]).built
    archive = unpacked(built.path, tmp_path_factory.mktemp("archive"))
    packed = [path for path in archive.rglob("*") if "weights" in path.relative_to(archive).parts]
    load(archive, None).close()
    there = archive / "weights" / "models" / "llm.gguf"

    assert packed == []
    assert json.loads((archive / "build.json").read_text())["inputs"]["weights"] == {"models/llm.gguf": DIGEST}
    assert there.read_bytes() == CONTENT
    assert there.is_symlink()
    assert there.resolve() == cache / DIGEST / "llm.gguf"


def test_versions_and_projects_share_what_was_fetched_once(elsewhere: Path, cache: Path) -> None:
    first = fetched(str(elsewhere), DIGEST, "llm.gguf")
    elsewhere.unlink()
    second = fetched("/nowhere/else.bin", DIGEST, "other.bin")

    assert first == second == cache / DIGEST / "llm.gguf"


def test_a_folder_is_fetched_whole_without_its_hidden_files(
    elsewhere: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = elsewhere.parent
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("main")
    found = fetched(f"file://{folder}", sha256(folder), "model")

    assert sorted(path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()) == [
        "inner/config.json",
        "llm.gguf",
    ]
    assert sha256(found) == sha256(folder)


def test_what_fsspec_reads_is_fetched_as_a_file_or_a_folder(elsewhere: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/hub/model/llm.gguf": CONTENT, "/hub/model/inner/config.json": b"{}", "/hub/model/.lock": b""})
    (elsewhere.parent / "inner").mkdir()
    (elsewhere.parent / "inner" / "config.json").write_text("{}")
    file = fetched("memory://hub/model/llm.gguf", DIGEST, "llm.gguf")
    folder = fetched("memory://hub/model", sha256(elsewhere.parent), "model")

    assert file.read_bytes() == CONTENT
    assert (folder / "inner" / "config.json").read_text() == "{}"


def test_a_fetch_that_ends_early_is_said_and_the_next_goes_on_from_there(server: WeightsServer) -> None:
    server.breaks_after = 2_000_000
    with pytest.raises(FetchError, match=r"ended after 2,000,000 of 3,200,000 bytes; the next attempt goes on"):
        fetched(server.url, DIGEST, "llm.gguf")
    found = fetched(server.url, DIGEST, "llm.gguf")

    assert found.read_bytes() == CONTENT
    assert server.starts == [0, 2_000_000]


def test_a_server_that_cannot_begin_in_the_middle_is_asked_for_all_of_it(server: WeightsServer) -> None:
    server.ranges, server.breaks_after = False, 2_000_000
    with pytest.raises(FetchError):
        fetched(server.url, DIGEST, "llm.gguf")

    assert fetched(server.url, DIGEST, "llm.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"of another file", b"x" * 4_000_000])
def test_whatever_an_earlier_attempt_left_the_right_weights_are_fetched(
    part: bytes, server: WeightsServer, elsewhere: Path, cache: Path
) -> None:
    cache.mkdir()
    for address in (server.url, str(elsewhere)):
        (cache / f"{DIGEST}.part").write_bytes(part)
        found = fetched(address, DIGEST, "llm.gguf")

        assert found.read_bytes() == CONTENT
        found.unlink()


def test_of_two_processes_one_fetches_and_both_have_the_weights(server: WeightsServer) -> None:
    server.gate.clear()
    first = fetch_in_process(server.url)
    wait_for(lambda: bool(server.starts))
    second = fetch_in_process(server.url)
    wait_for(lambda: waits_for_the_lock(second) or len(server.starts) > 1)
    server.gate.set()
    answers = [process.communicate(timeout=120) for process in (first, second)]

    assert answers == [(f"{DIGEST}\n", "")] * 2
    assert server.starts == [0]


def test_a_process_that_is_killed_leaves_its_part_to_the_one_that_waits(server: WeightsServer, cache: Path) -> None:
    server.gate.clear()
    first = fetch_in_process(server.url)
    part = cache / f"{DIGEST}.part"
    wait_for(lambda: part.exists() and part.stat().st_size >= 1_000_000)
    second = fetch_in_process(server.url)
    wait_for(lambda: waits_for_the_lock(second))
    first.send_signal(signal.SIGKILL)
    first.communicate()
    server.gate.set()

    assert second.communicate(timeout=120) == (f"{DIGEST}\n", "")
    assert len(server.starts) == 2
    assert server.starts[1] >= 1_000_000


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("/nowhere/llm.gguf", "/nowhere/llm.gguf: No such file or directory"),
        ("memory://nowhere/llm.gguf", "there is no such file"),
        ("nowhere://llm.gguf", "Protocol not known: nowhere"),
        ("{server}/other", "HTTP Error 404: Not Found"),
        ("http://127.0.0.1:1/llm.gguf", "<urlopen error [Errno 111] Connection refused>"),
    ],
)
def test_a_source_that_is_not_there_is_one_sentence_with_the_line_of_the_card(
    address: str, said: str, project: Path, server: WeightsServer
) -> None:
    address = address.replace("{server}", server.url)
    refer(project, address, sha256=DIGEST)
    (built,) = build(Project(project), ["upper"]).built
    archive = unpacked(built.path, project / "archive")
    with pytest.raises(CheckError) as refused:
        load(archive, None)

    where = f"{archive}/handlers/upper.yaml:10"
    assert str(refused.value) == f"{where}: models/llm.gguf cannot be fetched from {address}: {said}"


def test_other_weights_than_the_card_says_are_not_served(project: Path, elsewhere: Path, cache: Path) -> None:
    refer(project, str(elsewhere), sha256="0" * 64)
    with pytest.raises(CheckError, match=f"its sha256 is {DIGEST}, and the card says 000"):
        link_weights(Project(project), Project(project).handler("upper"))

    assert not (project / "weights").exists()
    assert [path.name for path in cache.iterdir()] == [f"{'0' * 64}.lock"]


def test_a_name_that_leads_out_of_the_cache_is_refused(tmp_path: Path) -> None:
    class Store:
        def names(self) -> list[str]:
            return ["../../.profile"]

        def open(self, name: str, start: int) -> OpenedWeights:
            raise AssertionError(name)

    with pytest.raises(ValueError, match="would lie outside the cache"):
        weight_cache._copy(Store(), tmp_path / "part")


def test_a_link_into_a_cache_that_was_deleted_is_made_anew(project: Path, elsewhere: Path, cache: Path) -> None:
    refer(project, str(elsewhere), sha256=DIGEST)
    link_weights(Project(project), Project(project).handler("upper"))
    (cache / DIGEST / "llm.gguf").unlink()
    link_weights(Project(project), Project(project).handler("upper"))

    assert (project / "weights" / "models" / "llm.gguf").read_bytes() == CONTENT


def test_weights_that_are_in_the_project_are_not_fetched_and_are_verified_by_build(project: Path) -> None:
    refer(project, "/nowhere/llm.gguf", sha256=DIGEST)
    path = project / "weights" / "models" / "llm.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"others")
    link_weights(Project(project), Project(project).handler("upper"))
    problems = "\n".join(map(str, build(Project(project), ["upper"]).problems))

    assert path.read_bytes() == b"others"
    assert f"and the card says {DIGEST}" in problems


def test_a_reference_without_a_digest_is_refused_and_build_can_write_that_of_a_path(
    project: Path, elsewhere: Path
) -> None:
    refer(project, str(elsewhere))
    problems = "\n".join(map(str, build(Project(project), ["upper"]).problems))
    with pytest.raises(CheckError, match="the card has no sha256"):
        link_weights(Project(project), Project(project).handler("upper"))
    updated = build(Project(project), ["upper"], update_cards=True)

    assert "models/llm.gguf: the card has no sha256" in problems
    assert [card.sha256 for card in updated.updated] == [DIGEST]
    assert [built.name for built in updated.built] == ["upper"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fetch_from": "models/llm.gguf"}, "neither an absolute path nor an address"),
        ({"fetch_from": "https://me:secret@example.com/llm.gguf"}, "has no password"),
        ({"fetch_from": "/models/llm.gguf", "sha256": "../../../etc"}, "a sha256 has 64 digits"),
    ],
)
def test_a_reference_that_cannot_be_right_is_refused_with_its_line(
    fields: dict[str, str], said: str, project: Path
) -> None:
    refer(project, "", **fields)
    report = build(Project(project), ["upper"])

    assert "upper.yaml:10: card.weights[0]" in "\n".join(map(str, report.problems))
    assert said in "\n".join(map(str, report.problems))
