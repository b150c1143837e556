"""The processes that keep a server running: `python -m torchserve_dag.stack watcher|keeper PROJECT [--foreground]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from torchserve_dag.server.state import State


def main() -> None:
    os.umask(0o077)  # logs and records are their owner's only
    role, root = sys.argv[1], Path(sys.argv[2])
    if role == "watcher":
        from torchserve_dag.stack import watcher  # noqa: PLC0415 (it stays small: the keeper is ten times its size)

        watcher.main(State(root), foreground="--foreground" in sys.argv)
    else:
        from torchserve_dag.stack import keeper  # noqa: PLC0415

        keeper.main(root)


if __name__ == "__main__":
    main()
