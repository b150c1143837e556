"""What a worker's relay runs (see `output.py`): it passes lines on, and lets only the worker's own commands be obeyed.

    python -I -S relay.py COMMANDS STDOUT STDERR

The arguments are descriptors to read from. Commands, and the worker's standard output, go to this program's standard
output. It is one process that writes whole lines, so that no line ever begins in the middle of another.
"""

from __future__ import annotations

import os
import re
import select
import sys

LINE_END = rb"\n|\r|\xc2\x85|\xe2\x80\xa8|\xe2\x80\xa9"
"""Where Java's Scanner ends a line, in UTF-8: also at NEL and at the separators of lines and paragraphs."""
COMMAND = re.compile(rb"(^|" + LINE_END + rb")((?:INFO > )?\[(?:METRICS|PID)\])")
"""The beginning of a line that TorchServe (0.12.0, WorkerLifeCycle) obeys."""
MAX_LINE = 1 << 16
"""A longer line is cut."""


def harmless(text: bytes) -> bytes:
    """The lines, with a blank before those that would be obeyed."""
    return COMMAND.sub(rb"\1 \2", text)


def whole_lines(data: bytearray) -> bytes:
    """Take the complete lines from `data`; a line that is too long is ended."""
    end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
    cut = b"" if end or len(data) < MAX_LINE else b"\n"
    lines = bytes(data[: end or (len(data) if cut else 0)]) + cut
    del data[: len(lines) - len(cut)]
    return lines


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def main() -> None:
    commands, output, errors = map(int, sys.argv[1:])
    targets, rest = {commands: 1, output: 1, errors: 2}, {source: bytearray() for source in (commands, output, errors)}
    poll = select.poll()
    for source in targets:
        poll.register(source, select.POLLIN)
    while rest:
        for source, _ in poll.poll():
            read = os.read(source, MAX_LINE)
            rest[source] += read or (b"\n" if rest[source] else b"")
            lines = whole_lines(rest[source])
            write(targets[source], lines if source == commands else harmless(lines))
            if not read:
                poll.unregister(source)
                del rest[source]


if __name__ == "__main__":
    main()
