"""What is served is what is said: archives and their copies, the order of versions, releases.yaml, what `up` loads."""

from __future__ import annotations

import json
import os
import random
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from torchserve_dag.archives import archive as archives
from torchserve_dag.archives import mar
from torchserve_dag.archives.archive import Archive, ModelVersion, Store, UnusableArchiveError
from torchserve_dag.archives.build import build
from torchserve_dag.clients.models import version_key
from torchserve_dag.commands import app
from torchserve_dag.releases import rollout
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.runtime.project.folders import Project
from torchserve_dag.server import launch, processes, releases_file, selection
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.releases_file import Releases
from torchserve_dag.server.selection import Selection, select
from torchserve_dag.server.state import ServerRecord, State
from torchserve_dag.stack import settings


def pack(path: Path, name: str, version: str | None = "1.0", code: str = "", **more: str) -> Path:
    """A `.mar` as model-archiver makes it: a manifest and a handler."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = {"modelName": name, "handler": "h.py"} | ({"modelVersion": version} if version else {})
    with zipfile.ZipFile(path, "w") as made:
        made.writestr(mar.MANIFEST, json.dumps({"model": model, "createdOn": str(random.random())}))
        made.writestr("h.py", code)
        for entry, text in more.items():
            made.writestr(entry.replace("__", "."), text)
    return path


class TestOrder:
    @pytest.mark.parametrize(
        "versions",
        [
            ["1.9", "1.10"],
            ["v9", "v10"],
            ["2024-9-1", "2024-10-1"],
            ["2.0.0", "2.0.1-rc1", "2.0.1"],
            ["2.0.dev1", "2.0a1", "2.0rc1", "2.0", "2.0.post1"],
            ["1.0", "1.0+cpu", "1.1"],
            ["1.0", "1.0-cpu", "1.0-fp16", "1.1"],  # which PEP 440 does not know; -c is not a candidate
            ["prod-9", "prod-10", "1.0"],
            ["1.²", "1.9", "2"],  # a digit that int does not read
        ],
    )
    def test_pep_440_where_it_knows_a_version_and_natural_order_elsewhere(self, versions: list[str]) -> None:
        mixed = random.Random(1).sample(versions, len(versions))

        assert sorted(mixed, key=version_key) == versions

    @given(st.lists(st.one_of(st.text(max_size=12), st.from_regex(r"[v0-9a-z.+!-]{1,12}", fullmatch=True)), max_size=9))
    def test_all_strings_have_one_order(self, versions: list[str]) -> None:
        """Whatever order they come in."""
        ordered = sorted(versions, key=version_key)

        assert sorted(random.Random(1).sample(versions, len(versions)), key=version_key) == ordered
        assert sorted(ordered[1:], key=version_key) == ordered[1:]

    def test_a_number_of_any_length_is_one(self) -> None:
        assert version_key("9" * 6000) < version_key("1" + "0" * 6000) < version_key("1.0")


class TestArchives:
    @pytest.mark.parametrize(
        ("name", "version"), [("m", "1.0"), ("My-Model.v2", "2024-10-1"), ("m", "1.0+cpu"), ("m", None), ("m_1", "v9")]
    )
    def test_what_every_part_can_carry_is_served(self, tmp_path: Path, name: str, version: str | None) -> None:
        found = archives.read_archive(pack(tmp_path / "any.mar", name, version))

        assert (found.name, found.version) == (name, version or "1.0")

    @pytest.mark.parametrize(
        ("name", "version", "why"),
        [
            ("m", "1.0?", 'is of a version "1.0?"'),  # the front door's name for 1.0 with a fallback
            ("m", "1.0!2.0", 'is of a version "1.0!2.0"'),
            ("m", "1.²", 'is of a version "1.²"'),
            ("m", "1/2", 'is of a version "1/2"'),
            ("m", "", 'is of a version ""'),
            ("m", "1" * 65, "is of a version"),
            ("modèle", "1.0", 'is of a model "modèle"'),
            ("a,b", "1.0", 'is of a model "a,b"'),  # load_models separates names by commas
            ("a b", "1.0", 'is of a model "a b"'),
        ],
    )
    def test_what_some_part_cannot_carry_is_refused_in_a_sentence(
        self, tmp_path: Path, name: str, version: str, why: str
    ) -> None:
        path = pack(tmp_path / "any.mar", name, "x")
        if version != "x":
            path = pack(tmp_path / "any.mar", name, None)
            with zipfile.ZipFile(path, "w") as made:
                made.writestr(mar.MANIFEST, json.dumps({"model": {"modelName": name, "modelVersion": version}}))
        with pytest.raises(UnusableArchiveError) as error:
            archives.read_archive(path)

        assert str(error.value).startswith(why)

    @pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"model": []}', '{"model": "m"}', "[" * 100_000, "\xff"])
    def test_a_bad_archive_is_named_and_the_others_are_read(self, tmp_path: Path, manifest: str) -> None:
        pack(tmp_path / "good.mar", "m")
        with zipfile.ZipFile(tmp_path / "bad.mar", "w") as made:
            made.writestr(mar.MANIFEST, manifest.encode("latin-1"))
        (tmp_path / "text.mar").write_text("no zip")
        (tmp_path / "folder.mar").mkdir()
        store = archives.read_store(tmp_path)

        assert store.archives.keys() == {("m", "1.0")}
        assert store.unusable["bad.mar"].startswith("is not an archive")
        assert store.unusable["text.mar"].startswith("is not an archive")
        assert store.unusable["folder.mar"].startswith("is not a .mar file")

    def test_the_hash_is_of_the_content_not_of_when_or_at_which_commit_it_was_packed(self, tmp_path: Path) -> None:
        def build_json(commit: str) -> str:
            return json.dumps({"inputs": {"commit": commit, "weights": {}}})

        one = pack(tmp_path / "1.mar", "m", build__json=build_json("a"))
        same = pack(tmp_path / "2.mar", "m", build__json=build_json("b"))
        other = pack(tmp_path / "3.mar", "m", code="1", build__json=build_json("a"))

        assert one.read_bytes() != same.read_bytes()
        assert mar.content_hash(one) == mar.content_hash(same) != mar.content_hash(other)

    def test_what_is_served_is_a_copy_that_writing_over_the_file_does_not_change(self, tmp_path: Path) -> None:
        store, own = tmp_path / "store", tmp_path / "own"
        first = archives.read_archive(pack(store / "m.mar", "m", code="1"))
        copied = archives.copy(first, own)
        served = copied.path.read_bytes()
        with (store / "m.mar").open("r+b") as file:  # in place, as cp and many tools write
            file.write(b"\0" * 10)
        pack(store / "m.mar", "m", code="2")

        assert copied.path.read_bytes() == served
        assert copied.path.stat().st_mode & 0o077 == 0
        assert archives.copies(own) == {("m", "1.0"): copied}
        with pytest.raises(UnusableArchiveError, match="changed while it was copied"):
            archives.copy(first, tmp_path / "another")
        assert list((tmp_path / "another").iterdir()) == []

    def test_a_copy_that_is_damaged_is_made_again(self, tmp_path: Path) -> None:
        first = archives.read_archive(pack(tmp_path / "m.mar", "m"))
        archives.copy(first, tmp_path / "own").path.write_bytes(b"a disk lost it")

        assert archives.read_archive(archives.copy(first, tmp_path / "own").path).hash == first.hash

    @pytest.mark.parametrize("number", sorted(archives._NO_RANGES))
    def test_it_is_copied_where_a_file_system_has_no_ranges_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        def refuse(*_: object) -> int:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "copy_file_range", refuse)
        first = archives.read_archive(pack(tmp_path / "m.mar", "m", code="x" * 5000))

        assert archives.copy(first, tmp_path / "own").path.read_bytes() == first.path.read_bytes()

    def test_a_copy_that_cannot_be_made_says_why(self, tmp_path: Path) -> None:
        (tmp_path / "own").write_text("a file, where a folder should be")
        with pytest.raises(UnusableArchiveError, match=r"cannot be copied to .*own: "):
            archives.copy(archives.read_archive(pack(tmp_path / "m.mar", "m")), tmp_path / "own")


class TestReleasesFile:
    def test_it_says_what_was_decided_in_order_and_who_writes_it(self, tmp_path: Path) -> None:
        state = State(tmp_path)
        releases_file.decide(state, "default", "zebra", "1.0", "aaa", "first")
        releases_file.decide(state, "default", "ant", "1.0", "bbb", "first")
        releases_file.decide(state, "rejected", "ant", "2.0", "ccc", "errors 5.3% of 151 requests, over 1.00%")
        releases_file.decide(state, "retired", "ant", "0.10", "ddd", "torchserve-dag retire")
        releases_file.decide(state, "retired", "ant", "0.9", "eee", "torchserve-dag retire")
        text = (tmp_path / "releases.yaml").read_text()
        data = yaml.safe_load(text)

        assert text.startswith("# Which versions were decided on. Written by torchserve-dag")
        assert list(data) == ["zebra", "ant"]
        assert list(data["ant"]["retired"]) == ["0.9", "0.10"]
        assert data["ant"]["rejected"]["2.0"]["reason"] == "errors 5.3% of 151 requests, over 1.00%"
        assert data["ant"]["rejected"]["2.0"]["hash"] == "ccc"
        assert releases_file.decided(releases_file.read(tmp_path))["ant", "1.0"][0] == "default"

    def test_the_last_decision_about_a_version_counts(self, tmp_path: Path) -> None:
        state = State(tmp_path)
        kinds = ["default", "rejected", "served", "retired", "rejected", "default"]
        for kind in kinds:
            releases_file.decide(state, kind, "m", "1.0", "", "")  # type: ignore[arg-type]
            decided = releases_file.decided(releases_file.read(tmp_path))
            assert {key: one[0] for key, one in decided.items()} == {("m", "1.0"): kind}

        releases_file.decide(state, "rejected", "m", "2.0", "", "")
        releases_file.forgive(state, "m", ["2.0"])
        assert releases_file.decided(releases_file.read(tmp_path)).keys() == {("m", "1.0")}

    def test_what_is_decided_at_once_is_all_kept(self, tmp_path: Path) -> None:
        def keep(i: int) -> None:
            releases_file.decide(State(tmp_path), "default", f"m{i}", "1.0", "", "")
            releases_file.decide(State(tmp_path), "rejected", f"m{i}", "2.0", "", "")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(keep, range(8)))

        assert len(releases_file.decided(releases_file.read(tmp_path))) == 16

    def test_an_edit_by_hand_is_kept_and_a_mistake_is_named_with_its_line(self, tmp_path: Path) -> None:
        path = tmp_path / "releases.yaml"
        path.write_text('m:\n  default: {version: "1.0"}\n')
        releases_file.decide(State(tmp_path), "rejected", "m", "2.0", "", "bad")
        assert releases_file.read(tmp_path)["m"].default

        path.write_text('m:\n  default: {version: "1.0"}\n  rejectd: {}\n')
        with pytest.raises(CheckError, match=r'releases\.yaml:3: .*"?rejectd'):
            releases_file.decide(State(tmp_path), "rejected", "m", "2.0", "", "bad")
        assert "rejectd" in path.read_text()

    @given(st.text(max_size=50), st.from_regex(archives.VERSION, fullmatch=True))
    def test_any_reason_is_a_line_that_can_be_read_again(self, reason: str, version: str) -> None:
        """A worker's error has whatever its author, or a client, wrote."""
        with tempfile.TemporaryDirectory() as folder:
            releases_file.decide(State(Path(folder)), "rejected", "m", version, "0e1", reason)
            decision = releases_file.read(Path(folder))["m"].rejected[version]

        assert decision.hash == "0e1"
        assert decision.reason.split() == "".join(c if c.isprintable() else " " for c in reason).split()
        assert "\n" not in decision.reason


def one(name: str, version: str, content: str = "aaa", folder: str = "store") -> Archive:
    return Archive(Path(folder) / f"{name}-{version}-{content}.mar", name, version, content)


def store_of(*found: Archive, **unusable: str) -> Store:
    keys = {(each.name, each.version) for each in found}
    return Store({key: tuple(a for a in found if (a.name, a.version) == key) for key in keys}, unusable)


def releases(text: str, folder: Path) -> Releases:
    (folder / "releases.yaml").write_text(text)
    return releases_file.read(folder)


def loaded(chosen: Selection) -> list[ModelVersion]:
    return sorted(chosen.archives, key=lambda key: (key[0], version_key(key[1])))


def said(chosen: Selection) -> dict[str, str]:
    return {remark.what: remark.kind for remark in chosen.remarks}


class TestSelection:
    OLD = tuple(one("m", version) for version in ("1.8", "1.9", "1.10", "v1.11"))

    def test_the_first_start_loads_the_highest_and_the_one_below(self) -> None:
        chosen = select(store_of(*self.OLD), {}, (), {})

        assert loaded(chosen) == [("m", "1.10"), ("m", "v1.11")]
        assert said(chosen) == {"m 1.8": "left out", "m 1.9": "left out"}

    def test_a_newer_archive_is_loaded_and_told_of_and_older_ones_are_not(self, tmp_path: Path) -> None:
        chosen = select(store_of(*self.OLD), releases('m: {default: {version: "1.9"}}', tmp_path), (), {})

        assert loaded(chosen) == [("m", "1.9"), ("m", "v1.11")]
        assert said(chosen) == {"m 1.8": "left out", "m 1.10": "left out", "m v1.11": "new"}

    def test_what_was_rejected_or_retired_stays_out_with_its_reason(self, tmp_path: Path) -> None:
        text = """
m:
  default: {version: "1.9"}
  rejected: {v1.11: {date: 2026-11-01 10:00:00 UTC, reason: errors 5% of 100 requests}}
  retired: {"1.10": {}}
"""
        chosen = select(store_of(*self.OLD), releases(text, tmp_path), (), {})

        assert loaded(chosen) == [("m", "1.8"), ("m", "1.9")]
        assert "rejected on 2026-11-01: errors 5% of 100 requests; torchserve-dag serve m/v1.11 loads it" in str(
            chosen.remarks[-1]
        )

    def test_what_routes_and_serve_name_is_loaded_whatever_was_decided(self, tmp_path: Path) -> None:
        text = 'm: {default: {version: "1.9"}, served: {"1.8": {}}, rejected: {"1.10": {}}}'
        chosen = select(store_of(*self.OLD), releases(text, tmp_path), {("m", "1.10")}, {})

        assert loaded(chosen) == [("m", "1.8"), ("m", "1.9"), ("m", "1.10"), ("m", "v1.11")]

    def test_a_decided_version_without_an_archive_is_a_fault_and_others_are_served(self, tmp_path: Path) -> None:
        text = 'm: {default: {version: "3.0"}}\ngone: {default: {version: "1.0"}}'
        chosen = select(store_of(*self.OLD, bad="is no archive"), releases(text, tmp_path), {("m", "4.0")}, {})

        assert loaded(chosen) == [("m", "v1.11")]
        assert {what for what, kind in said(chosen).items() if kind == "failed"} == {
            "bad",
            "m 3.0",
            "m 4.0",
            "gone 1.0",
        }

    def test_two_files_of_one_version_are_left_out_unless_one_was_decided_on(self, tmp_path: Path) -> None:
        store = store_of(one("m", "1.0", "aaa"), one("m", "1.0", "bbb"), one("other", "1.0"))
        chosen = select(store, {}, (), {})
        assert loaded(chosen) == [("other", "1.0")]
        assert "m-1.0-aaa.mar and m-1.0-bbb.mar are of this version, and differ" in str(chosen.remarks)

        decided = releases('m: {default: {version: "1.0", hash: bbb}}', tmp_path)
        assert select(store, decided, (), {}).archives["m", "1.0"].hash == "bbb"

    def test_an_archive_that_was_changed_is_not_served_while_the_copy_is_there(self, tmp_path: Path) -> None:
        decided = releases('m: {default: {version: "1.0", hash: aaa}}', tmp_path)
        changed, copy = store_of(one("m", "1.0", "bbb")), one("m", "1.0", "aaa", "own")

        assert select(changed, decided, (), {("m", "1.0"): copy}).archives == {("m", "1.0"): copy}
        assert select(changed, decided, (), {}).archives["m", "1.0"].hash == "bbb"  # said, below
        (remark,) = selection.differences(changed, decided)
        assert remark.fault
        assert "releases.yaml decided on aaa, and bbb is in the store" in remark.why

    def test_status_says_what_differs_what_is_new_and_what_was_rolled_back(self, tmp_path: Path) -> None:
        text = """
m: {default: {version: "1.0", hash: aaa}, rejected: {"2.0": {reason: slow}, "0.9": {reason: wrong}}}
n: {default: {version: "1.0"}, retired: {"0.1": {}}}
"""
        versions = ("1.0", "bbb"), ("0.9", "aaa"), ("2.0", "aaa"), ("3.0", "aaa")
        store = store_of(*(one("m", *version) for version in versions), one("n", "1.0"), one("new", "1.0"))
        served = {("m", "1.0"): one("m", "1.0", "aaa"), ("m", "2.0"): one("m", "2.0")}
        found = {remark.what: remark for remark in selection.standing(store, releases(text, tmp_path), served)}

        assert {what: remark.kind for what, remark in found.items()} == {
            "m 1.0": "differs", "m 2.0": "rejected", "m 0.9": "left out", "m 3.0": "new", "n 1.0": "failed",
            "new 1.0": "new",
        }  # fmt: skip
        assert found["m 0.9"].why == "rejected on an unknown day: wrong; torchserve-dag serve m/0.9 loads it"
        assert "aaa is served, and bbb is in the store" in found["m 1.0"].why

    def test_load_models_may_name_some_files_of_the_store(self) -> None:
        store = store_of(one("m", "1.0"), one("n", "1.0"), **{"bad.mar": "is no archive"})
        some = store.only({"m-1.0-aaa.mar", "typo.mar"})

        assert some.archives.keys() == {("m", "1.0")}
        assert some.unusable == {"typo.mar": "is in load_models of config.properties, and not in the store"}


def serving(project: Path) -> None:
    """As while a server runs: this process stands for Java."""
    state = State(project)
    state.save(ServerRecord(os.getpid(), Addresses(), str(project / "model_store")))


class TestForce:
    def change(self, project: Path) -> None:
        path = project / "handlers" / "upper.py"
        path.write_text(path.read_text() + "\n# changed\n")

    @pytest.mark.parametrize("kind", ["default", "retired", "rejected"])
    def test_a_version_that_was_decided_on_is_not_replaced(self, project: Path, kind: str) -> None:
        build(Project(project), ["upper"])
        before = (project / "model_store" / "upper-1.0.mar").read_bytes()
        releases_file.decide(State(project), kind, "upper", "1.0", "", "")  # type: ignore[arg-type]
        self.change(project)
        found = CliRunner().invoke(app, ["build", "--force", "upper", "--project", str(project)])

        assert found.exit_code == 1
        assert f"upper-1.0.mar is {'the ' if kind == 'default' else ''}{kind} in releases.yaml" in found.stderr
        assert "give it a new one" in found.stderr
        assert (project / "model_store" / "upper-1.0.mar").read_bytes() == before

    def test_one_that_routes_yaml_names_is_not(self, project: Path) -> None:
        (project / "routes.yaml").write_text('upper: {versions: {"1.0": 1}, fallback: "0.9"}\n')

        assert settings.fixed(project).keys() == {("upper", "1.0"), ("upper", "0.9")}

    def test_one_that_is_served_is_not(self, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (built,) = build(Project(project), ["upper"]).built
        state = State(project)
        state.prepare()
        archives.copy(archives.read_archive(built.path), state.archives)
        assert settings.fixed(project) == {}

        monkeypatch.setattr(processes, "java", lambda *_: processes.psutil.Process())
        serving(project)
        assert settings.fixed(project) == {("upper", "1.0"): "is served now"}

    def test_while_nobody_decided_on_it_it_is(self, project: Path) -> None:
        build(Project(project), ["upper"])
        self.change(project)
        found = CliRunner().invoke(app, ["build", "--force", "upper", "--project", str(project)])

        assert found.exit_code == 0
        assert "replaced" in found.stdout


def test_check_says_that_an_archive_is_not_the_one_that_was_decided_on(project: Path) -> None:
    build(Project(project), ["upper"])
    releases_file.decide(State(project), "rejected", "upper", "2.0", "", "")
    releases_file.decide(State(project), "default", "upper", "1.0", "0123456789ab", "first")
    found = CliRunner().invoke(app, ["check", "--project", str(project)])

    assert found.exit_code == 1
    assert "releases.yaml:4: upper 1.0: releases.yaml decided on 0123456789ab, and " in found.stderr


def test_a_version_that_was_rolled_back_is_rejected_with_the_hash_of_its_archive(tmp_path: Path) -> None:
    """Also one that could not be loaded, of which the server has no copy."""
    state = State(tmp_path)
    state.make()
    path = pack(tmp_path / "model_store" / "m.mar", "m", "2.0")
    serving(tmp_path)
    rollout.reject(state, "m", "2.0", "it could not be loaded")

    kind, decision = releases_file.decided(releases_file.read(tmp_path))["m", "2.0"]
    assert (kind, decision.hash, decision.reason) == ("rejected", mar.content_hash(path), "it could not be loaded")


def test_copies_that_serve_no_more_are_deleted(tmp_path: Path) -> None:
    state = State(tmp_path)
    one = archives.read_archive(pack(tmp_path / "model_store" / "m.mar", "m", "1.0"))
    two = archives.read_archive(pack(tmp_path / "model_store" / "n.mar", "n", "1.0"))
    launch.copy_all(state, {("m", "1.0"): one, ("n", "1.0"): two})
    copied, failed = launch.copy_all(state, {("n", "1.0"): two})

    assert [path.name for path in state.archives.iterdir()] == [copied["n", "1.0"].path.name]
    assert failed == {}
