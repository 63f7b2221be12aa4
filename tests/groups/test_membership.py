"""The members of a job and its secret, as the environment tells them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from commopt.errors import ConfigError
from commopt.groups.membership import Membership
from commopt.secret import given_secret

SECRET = b"a secret of 16 bytes, or longer"


def test_a_place_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    members = [["10.77.0.1", 29501], ["10.77.0.1", 29502], ["10.77.0.2", 29501], ["10.77.0.2", 29502]]
    monkeypatch.setenv("COMMOPT_PEERS", json.dumps({"job": "ab12", "members": members}))
    for key, value in (("COMMOPT_NODE_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("COMMOPT_RETURNS", raising=False)
    assert Membership.from_environment() == Membership(3, tuple((h, p) for h, p in members), "ab12")  # type: ignore[misc]
    monkeypatch.setenv("COMMOPT_RETURNS", "1")
    found = Membership.from_environment()
    assert found is not None
    assert found.returns
    monkeypatch.delenv("COMMOPT_PEERS")
    assert Membership.from_environment() is None


@pytest.mark.parametrize(
    ("text", "rank", "words"),
    [
        ("{", "0", "environment: COMMOPT_PEERS={"),
        ('{"job": "a"}', "0", "'members'"),
        ('{"job": "a", "members": [["h", "x"]]}', "0", "invalid literal"),
        ('{"job": "a", "members": [["h", 1]]}', "4", "no rank 4 among 1 members"),
    ],
)
def test_an_environment_that_no_launcher_wrote_is_refused(
    monkeypatch: pytest.MonkeyPatch, text: str, rank: str, words: str
) -> None:
    monkeypatch.setenv("COMMOPT_PEERS", text)
    monkeypatch.setenv("COMMOPT_NODE_RANK", rank)
    for key in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ConfigError, match=words):
        Membership.from_environment()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"COMMOPT_SECRET": ""}, "COMMOPT_SECRET gives a secret of 0 bytes, which can be guessed; give 16 or more"),
        ({"COMMOPT_SECRET": "short"}, "of 5 bytes"),
        ({"COMMOPT_SECRET_FILE": "/nowhere"}, "COMMOPT_SECRET_FILE=/nowhere: .*No such file"),
        ({"COMMOPT_SECRET_FILE": "/dev/null"}, "COMMOPT_SECRET_FILE gives a secret of 0 bytes"),
        ({"COMMOPT_SECRET": "a" * 20, "COMMOPT_SECRET_FILE": "/dev/null"}, "both set; unset one of them"),
    ],
)
def test_a_secret_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], words: str) -> None:
    for key in ("COMMOPT_SECRET", "COMMOPT_SECRET_FILE"):
        monkeypatch.delenv(key, raising=False)
    assert given_secret() is None
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ConfigError, match=words):
        given_secret()


def test_a_secret_is_read_from_the_environment_or_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("COMMOPT_SECRET", SECRET.decode())
    assert given_secret() == SECRET
    monkeypatch.delenv("COMMOPT_SECRET")
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    monkeypatch.setenv("COMMOPT_SECRET_FILE", str(tmp_path / "secret"))
    assert given_secret() == SECRET
