"""A `.mar` file: made by TorchServe's own archiver, then rewritten so that the same input gives the same bytes."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging import package_model
from model_archiver.model_packaging_utils import ModelExportUtils

from torchserve_dag.runtime.data import source, unzip

ENTRY = "serve.py"
"""The file that TorchServe's worker imports."""
SETTINGS = "model-config.yaml"
"""How TorchServe serves the model."""
BUILD = "build.json"
"""What an archive of ours says about itself: which file is served, its card, what it was built from."""
MANIFEST = "MAR-INF/MANIFEST.json"

BadArchiveError = zipfile.BadZipFile

Entries = dict[str, tuple[int, int]]
"""Files in an archive by their paths: the size and the checksum of each."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first moment that a zip can name
_MODE = 0o100644
_tempdir = threading.Lock()


def write(target: Path, name: str, version: str, small: Mapping[str, bytes], large: Mapping[str, Path]) -> None:
    """Write an archive of `small` files and of `large` ones, copied from disk, each by its path inside.

    ENTRY and SETTINGS are among the small ones. The parent folder of `target` exists.
    """
    with tempfile.TemporaryDirectory(prefix="torchserve-dag-") as folder:
        rewrite(_official(Path(folder), name, version, small), target, large)


def rewrite(official: Path, target: Path, large: Mapping[str, Path]) -> None:
    """What an archiver made, with `large` files added, so that the same input gives the same bytes."""
    with zipfile.ZipFile(official) as made, zipfile.ZipFile(target, "w") as archive:
        for entry in sorted({*made.namelist(), *large}):
            if entry in large:
                with large[entry].open("rb") as stream:
                    _add(archive, entry, stream, large[entry].stat().st_size)
            else:
                body = made.read(entry)
                body = _timeless(body) if entry.endswith("/MANIFEST.json") else body
                _add(archive, entry, io.BytesIO(body), len(body))


def _official(folder: Path, name: str, version: str, small: Mapping[str, bytes]) -> Path:
    """The archive as TorchServe's own archiver makes it, in `folder`."""
    top, tree = folder / "top", folder / "tree"
    for path, body in small.items():
        place = (top if path in {ENTRY, SETTINGS} else tree) / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(body)
    config = ModelArchiverConfig(
        model_name=name,
        version=version,
        handler=str(top / ENTRY),
        config_file=str(top / SETTINGS),
        extra_files=glob.escape(str(tree)),
        export_path=str(folder),
    )
    manifest = ModelExportUtils.generate_manifest_json(config)
    with private_tempdir(folder / "tmp"):
        package_model(config, manifest)
    return folder / f"{name}.mar"


@contextmanager
def private_tempdir(folder: Path) -> Iterator[None]:
    """Both archivers work in $TMPDIR/NAME, and delete whatever is there before they start."""
    folder.mkdir()
    with _tempdir:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield
        finally:
            tempfile.tempdir = before


def _timeless(manifest: bytes) -> bytes:
    fields = json.loads(manifest)
    fields["createdOn"] = "01/01/1980 00:00:00"  # TorchServe warns where it is missing
    return json.dumps(fields, indent=2).encode()


def _add(archive: zipfile.ZipFile, entry: str, stream: BinaryIO, size: int) -> None:
    # Stored, not deflated: weights do not compress, and versions of zlib deflate the same text differently.
    # TorchServe reads an archive as a stream, and Java's reader needs a stored entry's size before its bytes:
    # Python writes it there if the file is seekable.
    info = zipfile.ZipInfo(entry, _EPOCH)
    info.compress_type = zipfile.ZIP_STORED
    info.create_system = 3  # Unix, wherever it is built
    info.external_attr = _MODE << 16
    info.file_size = size
    with archive.open(info, "w") as out:
        shutil.copyfileobj(stream, out, 1 << 20)


def read_text(archive: Path, entry: str) -> str:
    """The text of a small file in an archive. Raises KeyError if it is missing, zipfile.BadZipFile."""
    return unzip.read(archive, entry).decode("utf-8")


def read_json(archive: Path, entry: str) -> Any:
    """The data of a small JSON file in an archive. Raises as `read_text`, and ValueError for what is not JSON."""
    try:
        return json.loads(read_text(archive, entry))
    except RecursionError:
        raise BadArchiveError(f"{entry} in it is nested too deeply") from None


def is_ours(archive: Path) -> bool:
    """Whether this package built the archive."""
    try:
        return BUILD in checksums(archive)
    except (OSError, BadArchiveError):
        return False


def is_asynchronous(archive: Path) -> bool:
    """Whether its answers may come in chunks: TorchServe's asynchronous mode."""
    try:
        settings = source.load(read_text(archive, SETTINGS))
    except (OSError, KeyError, ValueError, RecursionError, BadArchiveError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.get("asyncCommunication") is True


def language(archive: Path) -> tuple[str, ...]:
    """What OpenAI's API at `/v1` may ask of it (signature.py)."""
    try:
        said = read_json(archive, BUILD).get("language", ())
    except (OSError, KeyError, ValueError, RecursionError, AttributeError, BadArchiveError):
        return ()
    return tuple(str(one) for one in said) if isinstance(said, list) else ()


def name_and_version(archive: Path) -> tuple[str, str]:
    """The name and version under which TorchServe registers an archive."""
    model = read_json(archive, MANIFEST)["model"]
    return str(model["modelName"]), str(model.get("modelVersion", "1.0"))


def checksum(file: Path) -> tuple[int, int]:
    """The size and the checksum that a file has in an archive."""
    crc = 0
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            crc = zlib.crc32(chunk, crc)
    return file.stat().st_size, crc


def content_hash(archive: Path) -> str:
    """A short hash of what an archive contains, the same whenever it was packed.

    It is made of the sizes and checksums in the zip's directory, so that it is quick for an archive of any size; in
    archives of `build`, `build.json` has the SHA-256 of the weights besides.
    """
    entries: dict[str, object] = dict(checksums(archive))
    manifest = read_json(archive, MANIFEST)
    manifest.pop("createdOn", None)  # model-archiver writes the time
    entries[MANIFEST] = manifest
    if BUILD in entries:
        build = read_json(archive, BUILD)
        build.get("inputs", {}).pop("commit", None)  # the same files may be built at another commit
        entries[BUILD] = build
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:12]


def checksums(archive: Path) -> Entries:
    """Each file in an archive: its size and its checksum. Raises zipfile.BadZipFile for no archive."""
    return {entry.filename: (entry.file_size, entry.CRC) for entry in unzip.entries(archive)}
