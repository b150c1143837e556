"""What others made, or a machine gives, has bounds: each says what it is, where, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import read_store
from torchserve_dag.front_door import bootstrap, certificate, overload
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.runtime.compat import archive as archives
from torchserve_dag.runtime.data import source, unzip
from torchserve_dag.runtime.data.plain import WrongFieldError
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.graph.torchserve.war import read_war
from torchserve_dag.server.errors import ServerError
from torchserve_dag.stack import settings
from torchserve_dag.tuning import write as tuning

ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1, l: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def archive(path: Path, *, manifest: bytes, entry: str = mar.MANIFEST, more: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, body in {entry: manifest, **(more or {})}.items():
            packed.writestr(name, body)
    return path


@pytest.mark.parametrize("text", [ALIASES, MERGES])
@pytest.mark.parametrize("name", ["workflow.yaml", "front_door.yaml", "routes.yaml", "releases.yaml"])
def test_aliases_that_stand_for_billions_are_refused(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CheckError, match=f"{name}:1: not valid YAML: .*more than 50,000 keys and values"):
        source.read_plain(tmp_path / name)


def test_aliases_as_people_write_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("a: &a {k: 1}\nb: {<<: *a, l: 2}\nc: *a\n")

    assert source.read_plain(tmp_path / "some.yaml")[0] == {"a": {"k": 1}, "b": {"k": 1, "l": 2}, "c": {"k": 1}}


def test_a_manifest_that_fills_the_memory_is_not_read(tmp_path: Path) -> None:
    archive(tmp_path / "bomb.mar", manifest=bytes(unzip.MAX_FILE + 1))

    why = read_store(tmp_path).unusable["bomb.mar"]
    assert "MANIFEST.json" in why
    assert "at most 16,777,216" in why


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_not_unpacked(tmp_path: Path) -> None:
    manifest = json.dumps({"model": {"modelName": "a", "modelVersion": "1.0"}}).encode()
    huge = archive(tmp_path / "huge.mar", manifest=manifest, more={"weights.bin": bytes(unzip.MAX_MORE + 2**24)})

    assert "would unpack to" in read_store(tmp_path).unusable["huge.mar"]
    with pytest.raises(mar.BadArchiveError, match="would unpack to"):
        unzip.extract(huge, tmp_path / "out")
    war = huge.rename(tmp_path / "huge.war")
    with pytest.raises(CheckError, match="would unpack to"):
        read_war(war)


def _garbled(content: bytearray) -> None:
    content[30 + len(mar.MANIFEST) : 40 + len(mar.MANIFEST)] = b"\xff" * 10


def _encrypted(content: bytearray) -> None:
    content[6] |= 1
    content[content.find(b"PK\1\2") + 8] |= 1


def _of_an_unknown_compression(content: bytearray) -> None:
    content[8] = content[content.find(b"PK\1\2") + 10] = 99


@pytest.mark.parametrize("damage", [_garbled, _encrypted, _of_an_unknown_compression, None])
def test_whatever_is_wrong_in_an_archive_is_said(tmp_path: Path, damage: Callable[[bytearray], None] | None) -> None:
    manifest = json.dumps({"model": {"modelName": "a", "handler": "h.py"}}).encode() if damage else b"[" * 200_000
    for name, entry in {"a.mar": mar.MANIFEST, "a.war": "WAR-INF/MANIFEST.json"}.items():
        content = bytearray(archive(tmp_path / name, manifest=manifest, entry=entry).read_bytes())
        if damage:
            damage(content)
        (tmp_path / name).write_bytes(content)

    assert archives.handler_of(tmp_path / "a.mar") is None
    assert "is not an archive" in read_store(tmp_path).unusable["a.mar"]
    with pytest.raises(CheckError, match="is not an archive of torch-workflow-archiver's"):
        read_war(tmp_path / "a.war")


def test_a_manifest_names_files_inside_only(tmp_path: Path) -> None:
    (tmp_path / "secret.yaml").write_text("models: {}")
    manifest = {
        "workflow": {"specFile": "../../../../../../../..//" + str(tmp_path / "secret.yaml"), "handler": "h.py"}
    }
    war = archive(tmp_path / "out.war", entry="WAR-INF/MANIFEST.json", manifest=json.dumps(manifest).encode())

    with pytest.raises(CheckError, match="lies outside it"):
        read_war(war)


def test_archives_that_are_not_mar_files_are_said(tmp_path: Path) -> None:
    (tmp_path / "old.tar.gz").write_bytes(b"")
    (tmp_path / "unpacked" / "MAR-INF").mkdir(parents=True)
    (tmp_path / "unpacked" / "MAR-INF" / "MANIFEST.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("")

    assert sorted(read_store(tmp_path).unusable) == ["old.tar.gz", "unpacked"]


@pytest.mark.parametrize("name", ["front_door.yml", "routes.yml", "torchserve-dag.yml", "releases.yml"])
def test_settings_that_are_not_read_are_said(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("host: torchserve\n")
    with pytest.raises(CheckError, match=f"{name}:1: a file that ends in .yml is not read"):
        settings.read(tmp_path, [])


@pytest.mark.parametrize("listen", ["localhost:8443", "127.0.0.1:8443", "[::1]:8443", "[::]:8443", "0.0.0.0:8443"])
def test_the_front_door_listens_at_addresses_and_localhost(listen: str) -> None:
    address = bootstrap._listening(FrontDoor(listen=listen).listen)["socket_address"]

    assert address["address"] == {"localhost": "127.0.0.1"}.get(listen.rpartition(":")[0], listen[:-5].strip("[]"))
    assert address.get("ipv4_compat", False) == (listen == "[::]:8443")


def test_a_name_that_envoy_cannot_listen_at_is_refused() -> None:
    with pytest.raises(WrongFieldError, match="with an address or localhost"):
        FrontDoor(listen="serving.example.com:8443")


def test_a_key_with_a_passphrase_is_refused_and_asks_nobody(tmp_path: Path) -> None:
    shown, key = certificate.files(tmp_path, FrontDoor(), tmp_path)
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "locked.key").write_bytes(locked)

    with pytest.raises(ServerError, match=r"locked\.key of front_door.yaml has a passphrase"):
        certificate.files(tmp_path, FrontDoor(certificate=shown.name, key="locked.key"), tmp_path)


def test_a_process_that_may_open_few_files_takes_half_of_them_as_connections(tmp_path: Path) -> None:
    program = """
import resource
from torchserve_dag.front_door import start
from torchserve_dag.front_door.settings import FrontDoor
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1024))
start.raise_open_files()
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
print(start.few_connections(FrontDoor()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)

    files, said = done.stdout.splitlines()
    assert files == "1024"
    assert "it takes 512 connections, not 15,000" in said
    assert "LimitNOFILE" in said
    assert overload.connections(Limits(connections=10)) == 10


def test_a_disk_that_is_full_is_named_by_the_file(tmp_path: Path) -> None:
    program = """
import resource, signal, sys
from pathlib import Path
from torchserve_dag.archives import atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    atomic.write_text(Path(sys.argv[1]), "x" * 1000)
except OSError as error:
    print(error.filename)
"""
    target = str(tmp_path / "routes.yaml")
    done = subprocess.run([sys.executable, "-c", program, target], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == target
    assert list(tmp_path.iterdir()) == []


def test_tune_says_before_it_measures_that_it_could_not_write(tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("name: model\nrun: {batch: 4}\n")
    with pytest.raises(CheckError, match=r"model\.yaml:2: run: is written in braces"):
        tuning.check_writable(file)
    file.write_text("name: model\nrun:\n  batch: 4\n")
    tuning.check_writable(file)
