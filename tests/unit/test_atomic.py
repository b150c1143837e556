"""Files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchserve_dag.archives import atomic


def test_a_file_keeps_its_permissions_and_a_link_stays_a_link(tmp_path: Path) -> None:
    target, link = tmp_path / "target.yaml", tmp_path / "link.yaml"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)
    atomic.write_text(link, "after")

    assert (target.read_text(), target.stat().st_mode & 0o777, link.is_symlink()) == ("after", 0o640, True)
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_a_private_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "key"
    path.parent.mkdir(mode=0o700)
    path.write_text("old")
    path.chmod(0o644)
    atomic.write_private(path, "new")

    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


def test_what_cannot_be_written_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        atomic.write_text(path, "\ud800")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
