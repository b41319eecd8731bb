"""Foreign checkpoints and run folders: right digests, and contents that would have something done.

Every command that reads a checkpoint gets each of them: none may fetch, write, start or allocate because a file says
so, and each says what is wrong in one sentence.
"""

import hashlib
import http.server
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import xxhash

from checkpoints import layout
from checkpoints.identity import digest_json
from checkpoints.reader import verified
from launch.testing.commands import Ended, setformer, train_words


@pytest.fixture(scope="module")
def sound(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sound")
    ended = setformer(*train_words(digits, out, "checkpoint.every_steps=22", ranks=1))
    assert ended.code == 0, ended.err
    return out / "demo"


@pytest.fixture
def requests() -> Iterator[tuple[str, list[str]]]:
    """A server that nobody may ask, and what it was asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


def forged(sound: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a run whose trainer.json was changed, with digests that are right again."""
    run = place / "run"
    shutil.copytree(sound, run)
    (folder,) = layout.step_folders(run / "checkpoints")
    path = folder / "trainer.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["files"]:
        data = (folder / record["name"]).read_bytes()
        kind, _, _ = record["digest"].partition(":")
        assert kind in ("sha256", "xxh3_128"), kind
        digest = hashlib.sha256(data) if kind == "sha256" else xxhash.xxh3_128(data)
        record["size"] = len(data)
        record["digest"] = f"{kind}:{digest.hexdigest()}"
    write_manifest(folder, manifest)
    verified(folder)
    return run


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    body = {key: part for key, part in manifest.items() if key != "sha256"}
    (folder / "manifest.json").write_text(json.dumps({**body, "sha256": digest_json(body)}))


def commands(run: Path, image: Path, place: Path) -> dict[str, list[str]]:
    return {
        "predict": ["predict", str(run), str(image)],
        "eval": ["eval", str(run)],
        "export": ["ckpt", "export", str(run), str(place / "exported")],
        "deepspeed": ["ckpt", "export", str(run), str(place / "exported-ds"), "--deepspeed"],
        "diff": ["ckpt", "diff", str(run), str(run)],
        "show": ["ckpt", "show", str(run)],
        "ls": ["ckpt", "ls", str(run), "--verify"],
        "runs": ["runs", "show", str(run)],
    }


def assert_harmless(ended: Ended, name: str) -> None:
    assert "Traceback" not in ended.out + ended.err, (name, ended.err)
    assert ended.code in (0, 2, 3, 4), (name, ended.err)
    if ended.code:
        assert len(ended.error_lines) == 1, (name, ended.err)


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "what", ["pretrained", "checkpoint_path", "features_only", "data", "weights", "depth", "width"]
)
def test_no_command_does_what_a_checkpoint_asks_for(
    sound: Path, digits: Path, tmp_path: Path, requests: tuple[str, list[str]], what: str
) -> None:
    url, asked = requests
    trap = tmp_path / "trap"
    trap.mkdir()
    (tmp_path / "x.pth").write_bytes(b"\x80\x04.")

    def change(state: dict[str, Any]) -> None:
        config = state["config"]
        arguments = config["model"]["args"]
        if what == "pretrained":
            arguments |= {"pretrained": True, "cache_dir": str(trap), "pretrained_cfg": {"url": f"{url}/evil.pth"}}
        elif what == "data":
            config["data"] |= {"root": url, "cache": str(trap), "workers": 100_000}
        elif what == "weights":
            config["model"]["weights"] = "hf-hub:some/body"
        else:
            arguments |= {
                "checkpoint_path": {"checkpoint_path": str(tmp_path / "x.pth")},
                "features_only": {"features_only": True},
                "depth": {"depths": [10**9, 2, 2, 2]},
                "width": {"embed_dim": 10**8},
            }[what]

    run = forged(sound, tmp_path, change)
    image = next((digits / "images" / "val" / "3").iterdir())
    before = everything(tmp_path)
    ends = {name: setformer(*words, timeout=120) for name, words in commands(run, image, tmp_path).items()}
    for name, ended in ends.items():
        assert_harmless(ended, name)
    harmless = what in ("data", "weights")  # what the model is does not follow from these
    for name in ("predict", "export"):
        assert (ends[name].code == 0) is harmless, (name, ends[name].err)
    assert (ends["eval"].code == 0) is (what == "weights"), ends["eval"].err
    assert asked == []
    assert everything(trap) == set()
    new = everything(tmp_path) - before
    assert all(name.startswith("exported") for name in new), new


def test_neither_a_run_that_begins_nor_one_that_continues_does_it(sound: Path, digits: Path, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        state["config"]["model"]["args"]["checkpoint_path"] = str(tmp_path / "x.pth")
        state["config"]["data"]["root"] = "/nowhere"

    run = forged(sound, tmp_path, change)
    begun = setformer(*train_words(digits, tmp_path, f"model.weights={run}", "run.name=begun", ranks=1))
    assert begun.code == 0, begun.err  # parameters by name are all that is taken
    run.rename(tmp_path / "demo")
    went_on = setformer(*train_words(digits, tmp_path, ranks=1))
    assert went_on.code == 0, went_on.err


@pytest.mark.parametrize("override", ["pretrained=true", "checkpoint_path=x.pth", "cache_dir=/tmp", "embed_dims=3"])
def test_a_config_may_not_ask_for_it_either(digits: Path, tmp_path: Path, override: str) -> None:
    ended = setformer(*train_words(digits, tmp_path, f"model.args.{override}", ranks=1))
    assert (ended.code, len(ended.error_lines)) == (2, 1), ended.err
    assert f"model.args.{override.partition('=')[0]}" in ended.err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(classes=5),
        lambda state: state.update(classes=["a", 3]),
        lambda state: state.pop("run"),
        lambda state: state.update(config=7),
        lambda state: state["config"].update(model=[]),
        lambda state: state.update(inputs=None),
        lambda state: state["run"].update(evaluation={"top1": "x"}),
    ],
)
def test_what_speaks_of_no_run_is_one_sentence(
    sound: Path, digits: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    run = forged(sound, tmp_path, change)
    image = next((digits / "images" / "val" / "3").iterdir())
    for name, words in commands(run, image, tmp_path).items():
        assert_harmless(setformer(*words), name)
    assert setformer(*commands(run, image, tmp_path)["predict"]).code == 4


def test_texts_of_others_are_shown_as_they_are(sound: Path, tmp_path: Path) -> None:
    run = forged(sound, tmp_path, lambda state: None)
    (folder,) = layout.step_folders(run / "checkpoints")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["identity"]["model"] = "\x1b]0;owned\x07[bold]x[/bold] [/nope]"
    write_manifest(folder, manifest)
    for words in (["ckpt", "show", str(run)], ["ckpt", "ls", str(run)], ["runs", "ls", str(tmp_path)]):
        ended = setformer(*words)
        assert_harmless(ended, words[1])
        assert "\x1b]0" not in ended.out + ended.err
    (run / "ledger.jsonl").write_bytes(b'{"event":"began","time":1,"step":"x"}\n{"event":["attempt"],"time":1}\n\xff\n')
    for broken in (b"[]", b"5", b"null", b'{"best": 3, "evaluation": [1]}', b"\xff\xfe"):
        (run / "summary.json").write_bytes(broken)
        for words in (["runs", "show", str(run)], ["runs", "ls", str(tmp_path)], ["runs", "report", str(run)]):
            assert_harmless(setformer(*words), f"{words[1]} {broken!r}")


def test_one_bad_image_does_not_hide_the_others(sound: Path, digits: Path, tmp_path: Path) -> None:
    good = sorted((digits / "images" / "val" / "3").iterdir())[:2]
    (tmp_path / "bad.png").write_bytes(b"<html>")
    os.mkfifo(tmp_path / "pipe.png")
    words = [
        str(good[0]),
        str(tmp_path / "bad.png"),
        str(tmp_path / "pipe.png"),
        str(tmp_path / "none.png"),
        str(good[1]),
    ]
    ended = setformer("predict", str(sound), *words, timeout=120)
    assert ended.code == 3
    assert [line.split(": ")[0] for line in ended.out.splitlines()] == [str(path) for path in good]
    assert len(ended.error_lines) == 3
