"""Passwords and signatures of URLs are in nothing that a run writes or says."""

import os
from pathlib import Path

import pytest

from launch.testing.commands import setformer, train_words
from setformer_dist.core.secrets import redacted, redacted_json
from tests.unit.serving import served

SECRETS = (b"sEcReT", b"SIGNED", b"someone")


def with_secrets(url: str) -> str:
    return url.replace("://", "://someone:sEcReT@") + "/?sig=SIGNED&expires=9"


def assert_none_in(folder: Path) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        found = [secret for secret in SECRETS if secret in path.read_bytes()]
        assert not found, f"{path} holds {found}"
    return len(files)


def test_a_run_over_http_writes_no_secret(digits: Path, tmp_path: Path) -> None:
    with served(digits) as server:
        words = [f"data.root={with_secrets(server.url)}", f"data.cache={tmp_path / 'cache'}"]
        ended = setformer(*train_words(digits, tmp_path, *words))
        assert ended.code == 0, ended.err
        assert server.secrets, "the password was not used"
        assert not any(secret.decode() in ended.out + ended.err for secret in SECRETS)
        assert assert_none_in(tmp_path) > 10
        assert_none_in(Path(os.environ["XDG_CACHE_HOME"]))
        again = setformer(*train_words(digits, tmp_path, *words, "schedule.epochs=1"))
        assert again.code == 0, again.err  # config.json without secrets is no other config
        scored = setformer("eval", str(tmp_path / "demo"))
        assert scored.code == 2, scored.err
        assert "--data" in scored.err
        scored = setformer("eval", str(tmp_path / "demo"), "--data", with_secrets(server.url))
        assert scored.code == 0, scored.err


@pytest.mark.parametrize("fault", [("status", 403), ("reset",), ("status", 404)])
def test_what_fails_names_no_secret(digits: Path, tmp_path: Path, fault: tuple[object, ...]) -> None:
    with served(digits) as server:
        server.always["/train/index.json"] = fault
        overrides = [f"data.root={with_secrets(server.url)}", "data.read_timeout=2.0", "restart.limit=0"]
        ended = setformer(*train_words(digits, tmp_path, *overrides, ranks=1))
    assert ended.code != 0
    assert "127.0.0.1" in ended.err
    assert not any(secret.decode() in ended.out + ended.err for secret in SECRETS), ended.err
    assert_none_in(tmp_path)


def test_the_dry_run_shows_no_secret(digits: Path, tmp_path: Path) -> None:
    with served(digits) as server:
        ended = setformer(*train_words(digits, tmp_path, f"data.root={with_secrets(server.url)}"), "--dry-run")
    assert ended.code == 0, ended.err
    assert not any(secret.decode() in ended.out + ended.err for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://u:p@host/a/b?sig=1", "https://host/a/b"),
        ("https://u:p@ss@host:80?sig=1#x", "https://host:80"),
        ("s3://key@bucket/train-{000..146}.tar", "s3://bucket/train-{000..146}.tar"),
        ("'data.root=http://u:p@h/?s=1' data.cache=/tmp/a@b", "'data.root=http://h/' data.cache=/tmp/a@b"),
        ("http://h/a@b", "http://h/a@b"),
        ("http://h:80/a@b", "http://h:80/a@b"),
        ("http://[::1]:80/a@b?s=1", "http://[::1]:80/a@b"),
        ('["http://h:80","a@b"]', '["http://h:80","a@b"]'),
        ("s3://key:sec/ret+x@bucket/train", "s3://bucket/train"),
        ("http://u:p?q#r'\"<s\\@h/a?s=1 ", "http://h/a "),
        ("http://u:p/train/x is", "http:///train/x is"),
        ("http:/u:p/q@h/a", "http:/h/a"),
        ("see http://h:80, http://h: and x://h", "see http://h:80, http://h: and x://h"),
        ("C:/u:p@h and node:/srv@x", "C:/u:p@h and node:/srv@x"),
        ("http://:p/q@h:80/a, and b@c", "http://h:80/a, and b@c"),
        ("no URL: a@b?c", "no URL: a@b?c"),
        ("https://h/p#access_token=abc x", "https://h/p x"),
        ("'s3://b/k%3Ftoken%3Dabc' s3://b/a#b.tar", "'s3://b/k' s3://b/a#b.tar"),
        ("two: ftp://a@b/c and ftp://d@e/f?g=h.", "two: ftp://b/c and ftp://e/f"),
    ],
)
def test_what_is_left_of_a_url(text: str, left: str) -> None:
    assert redacted(text) == left
    assert redacted_json({"a": [text, 1, None]}) == {"a": [left, 1, None]}
