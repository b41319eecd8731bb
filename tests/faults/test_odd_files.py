"""Run folders in which something else lies in the place of the run's own files: nobody waits, fails or is misled."""

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.ckpt.prune import retention_of
from launch.history.page import report
from launch.history.show import list_runs, show_run
from launch.ranks.lock import held, supervising
from launch.run.config import RunConfig, check_folder, continued, load_run, resolve
from launch.run.inputs import inputs_of
from launch.testing.commands import DEMO
from setformer_dist.core import ledger
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import ConfigError, DataError, LaunchError
from setformer_dist.engine.metrics import RunRecord

TRAIN = {"kind": "train", "step": 1, "loss": 1.0, "lr": 0.1, "images_per_s": 10.0, "seconds": {"forward": 1.0}}
GUARD = {"kind": "guard", "step": 1, "loss": 9.0, "why": "spike", "action": "skip", "sample_ids": [1, 2]}


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.mkdir()


def _link_to_a_file(path: Path) -> None:
    path.with_name("of-another-user").write_text("theirs\n")
    path.symlink_to("of-another-user")


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


ODD = (_pipe, _folder, _link_to_a_file, _link_to_a_device, _socket)


@pytest.mark.parametrize("name", ["ledger.jsonl", "metrics.jsonl", "samples.jsonl", "run.lock", "logs/rank-00001.log"])
@pytest.mark.parametrize("make", ODD)
def test_a_run_does_not_begin_on_what_it_cannot_append_to(
    tmp_path: Path, name: str, make: Callable[[Path], None]
) -> None:
    (tmp_path / "logs").mkdir()
    make(tmp_path / name)
    before = {path: path.lstat().st_size for path in tmp_path.rglob("*")}
    for begun in (supervising(tmp_path), held(tmp_path, Alone())):
        with pytest.raises(LaunchError, match=f"{name} is not a plain file.*move it away"), begun:
            pass
    assert {path: path.lstat().st_size for path in tmp_path.rglob("*")} == before


def test_a_file_in_the_place_of_the_logs_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("x")
    with pytest.raises(LaunchError, match=r"logs is no folder.*move it away"), supervising(tmp_path):
        pass


@pytest.mark.parametrize("make", ODD)
def test_what_comes_in_the_midst_of_a_run_costs_lines_and_not_the_run(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    for name in (ledger.LEDGER, "metrics.jsonl", "samples.jsonl"):
        make(tmp_path / name)
        (tmp_path / "of-another-user").unlink(missing_ok=True)  # and a dangling link is not made good
    ledger.record(tmp_path, "attempt", number=1, ranks=1)
    record = RunRecord(tmp_path, is_main=True)
    record.write("train", 1, {"loss": 1.0})
    record.write_samples(1, [1, 2])
    record.close()
    assert not (tmp_path / "of-another-user").exists()


def test_a_ledger_of_enormous_length_is_read_in_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setformer_dist.core.files.LARGEST_RECORD", 1 << 24)
    ledger.record(tmp_path, "attempt", number=1, ranks=1)
    os.truncate(tmp_path / ledger.LEDGER, 1 << 43)
    (event,) = [e for e in ledger.read_events(tmp_path) if e["event"] != "seen"]
    assert event["number"] == 1


def _shown(folder: Path) -> Iterator[str]:
    for look in (
        lambda console: list_runs(folder.parent, console),
        lambda console: show_run(folder, console),
        lambda console: report(folder, console),
    ):
        out = io.StringIO()
        look(Console(file=out, width=200))
        yield out.getvalue()


@pytest.mark.parametrize("make", [*ODD, None])
@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger.jsonl", "summary.json"])
def test_looking_at_a_run_never_waits(
    tmp_path: Path, name: str, make: Callable[[Path], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("setformer_dist.core.files.LARGEST_RECORD", 1 << 24)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    if make is None:
        (run / name).write_bytes(b"")
        os.truncate(run / name, 1 << 43)
    else:
        make(run / name)
    began = time.monotonic()
    try:
        assert all(_shown(run)) or name == "summary.json"
    except DataError as error:
        assert name == "summary.json"
        assert "summary.json is damaged" in str(error)  # noqa: PT017 - some of these are sentences, some are read
    assert time.monotonic() - began < 60


WICKED: tuple[Any, ...] = (
    None,
    True,
    -1,
    10**400,
    1e308,
    "x",
    "\x1b]0;owned\x07",
    [],
    [1],
    {},
    {"rank": "x"},
    {"a": {}},
)


@pytest.mark.parametrize("row", [TRAIN, GUARD, {**TRAIN, "kind": "eval", "top1": 0.5, "samples": 3}])
def test_rows_of_others_are_shown_or_skipped(tmp_path: Path, row: dict[str, Any]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    rows: list[dict[str, Any]] = [{**row, "straggler": {"rank": 0, "phase": "data"}}, {"kind": "guard"}]
    for key in (*row, "straggler", "below", "sample_ids"):
        rows += [{**row, key: value} for value in WICKED]
    lines = [json.dumps(line if line.get("step") != 1 else {**line, "step": n}) for n, line in enumerate(rows)]
    lines.append('{"kind":"train","step":3,"x":' + "[" * 100_000 + "]" * 100_000 + "}")
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for text in _shown(run):
        assert "\x1b]0" not in text
    for moment in (1e300, 10**400, -1e300, 2.0**60):
        (run / "ledger.jsonl").write_text(
            "".join(
                json.dumps({"event": e, "time": moment, "why": "killed", "step": 1}) + "\n"
                for e in ("attempt", "ended")
            )
        )
        list_runs(tmp_path, Console(file=io.StringIO()))
        show_run(run, Console(file=io.StringIO()))


def demo(out: Path, *overrides: str) -> RunConfig:
    return load_run(Path(DEMO), ["data.root=x", f"run.out={out}", *overrides])


@pytest.mark.parametrize("make", [*ODD, None])
def test_an_odd_config_of_a_run_is_a_sentence(tmp_path: Path, make: Callable[[Path], None] | None) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    if make is None:
        (folder / "config.json").write_text('{"a":' * 100_000)
    else:
        make(folder / "config.json")
    config = continued(demo(tmp_path))
    with pytest.raises(ConfigError, match=r"config\.json is damaged.*move the folder away"):
        check_folder(resolve(config, 2))
    with pytest.raises(ConfigError, match=r"config\.json is damaged.*--keep-last"):
        retention_of(folder)


@pytest.mark.parametrize("text", ["[]", "7", "null", '{"checkpoint": 7}', '{"checkpoint": [1]}', "{}"])
def test_a_config_that_says_nothing_of_retention_is_a_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is damaged.*--keep-last"):
        retention_of(tmp_path)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("run.seed=99999999999999999999", r"run\.seed: an integer of a config has at most 64 bits"),
        ("model.args.stem_strides=[1,99999999999999999999]", r"model\.args\.stem_strides\.1: an integer of a config"),
        ("batch.global_size=9223372036854775807", r"batch\.global_size"),
        ('run.out="a\\u0000b"', r"run\.out.*control characters"),
        ('run.out="\\u001b[31m"', r"run\.out.*control characters"),
        ('data.root="a\\u0000b"', r"data\.root.*control characters"),
        ('data.mixture=[{root="a\\u0000b"}]', r"data\.mixture\.0\.root.*control characters"),
        ('model.weights="a\\u0000b"', r"model\.weights.*control characters"),
        ("run.out=runs\udce9", r"run\.out.*no text in this locale: set LC_ALL=C\.UTF-8"),
        ("schedule.warmup_epochs=1e308", r"schedule\.warmup_epochs"),
        ("data.mean=[1e308,1e308,1e308]", r"units of the full range: divide by 255"),
        ("data.std=[58.4,57.1,1e4]", r"units of the full range: divide by 255"),
        (f"run.out={'x' * 256}", r"run\.out.*255 bytes"),
        (f"run.name={'x' * 256}", r"run\.name.*at most 255"),
    ],
)
def test_keys_that_no_system_takes_are_refused_in_the_config(tmp_path: Path, override: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        demo(tmp_path, override)


def test_another_number_of_channels_than_images_have_is_refused(tmp_path: Path) -> None:
    config = demo(tmp_path, "model.args.in_chans=1")
    with pytest.raises(ConfigError, match=r"model\.args\.in_chans = 1, and images are read with 3 bands"):
        inputs_of(config.data).build_model(config.model, 10, {}, 0)
