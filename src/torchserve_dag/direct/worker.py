"""A worker's program: unpacks an archive, and serves it on a Unix socket.

    python worker.py ARCHIVE FOLDER SOCKET [--gpu N] --max-body BYTES [--most REQUESTS]

It is run as a file, not with `-m`: the package `torchserve_dag` that it makes importable has the archive's own
`runtime/`, and from this installation whatever archives do not carry. So this file imports nothing but the standard
library until then.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)  # this folder, whose http.py would hide Python's

import argparse
import fcntl
import importlib.util
import shutil
import signal
import zipfile
from pathlib import Path

PACKAGE = "torchserve_dag"


def main() -> None:
    parser = argparse.ArgumentParser(description="Serve an archive on a Unix socket.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("folder", type=Path, help="where the archive is unpacked, for all workers of its version")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--gpu", type=int)
    parser.add_argument("--max-body", type=int, required=True, help="in bytes")
    parser.add_argument("--most", type=int, help="how many requests may be inside")
    options = parser.parse_args()
    options.socket = options.socket.absolute()
    # Who sends SIGTERM to every process at once, as systemd may, must not end a worker before Envoy is drained. A
    # handler, for child processes of a model's would inherit SIG_IGN.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the keeper ignores it, which is inherited
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    try:
        unpack(options.archive, options.folder)
        use_runtime_of(options.folder)
        from torchserve_dag.direct import serving  # noqa: PLC0415 (only now it can be imported)

        serving.serve(options.folder, options.socket, options.gpu, options.max_body, options.most)
    except BaseException as error:
        failed(options.socket, error)
        raise


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive, unless another worker has. Its bounds were checked when it was copied to the server."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(part)
        part.rename(folder)


def use_runtime_of(archive: Path) -> None:
    """Import the package with the `runtime/` of an unpacked archive, if it has one, and the rest of this one."""
    installed = Path(__file__).parents[1]
    folders = [folder for folder in (archive / PACKAGE, installed) if (folder / "__init__.py").exists()]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folders[0] / "__init__.py", submodule_search_locations=[str(folder) for folder in folders]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"{folders[0]} is no package")
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def failed(socket: Path, error: BaseException) -> None:
    """Leave the reason of this process's end to the keeper, in one line beside the socket."""
    why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    part = socket.with_suffix(".part")
    part.write_text(" ".join(why.split())[:2000], "utf-8")
    part.replace(socket.with_suffix(".failed"))


if __name__ == "__main__":
    main()
