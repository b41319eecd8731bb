"""The figures for Prometheus: read back with the library's own parser, and named as Prometheus advises."""

from __future__ import annotations

import json
import os
import re
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from launch.ranks.attempt import FolderLostError
from launch.ranks.board import Board
from launch.ranks.environment import choose_port
from launch.ranks.exposition import TEXT_FILE, Exposition
from launch.ranks.usage import Use
from launch.run.config import load_run
from setformer_dist.core import ledger
from setformer_dist.core.errors import ConfigError, LaunchError
from setformer_dist.core.heartbeat import Beat
from setformer_dist.core.logging_config import LoggingConfig
from tests.unit.test_live import Rank

RANKS = [
    Rank(0, Beat(9, 12, "forward", 0.1), "a", used=Use(1.5, 0.9)),
    Rank(1, Beat(9, 11, "data", 2.0), 'b"\\\n', used=Use(None, None)),
]


def parsed(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def values(family: Metric, label: str = "rank") -> dict[str, float]:
    return {sample.labels.get(label, ""): sample.value for sample in family.samples}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two attempts, a checkpoint, an evaluation, and a line that is not whole yet."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for number in (1, 2):
        ledger.record(folder, "attempt", number=number, ranks=2)
        ledger.record(folder, "ended", why="killed" if number == 1 else "stopped", step=9)
    rows = [
        {"kind": "train", "step": 10, "loss": 1.5, "images_per_s": 99.0},
        {"kind": "eval", "step": 10, "top1": 0.75, "loss": 1.2, "samples": 360},
        {"kind": "guard", "step": 10, "loss": None},
        {"kind": "train", "step": 12, "loss": 1.25, "images_per_s": 101.0},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 13, "lo')
    step = folder / "checkpoints" / "step-00000010"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text("{}")
    os.utime(step / "manifest.json", (time.time() - 100,) * 2)
    return folder


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())


def test_the_endpoint_says_what_is_known_and_goes_with_the_run(run: Path) -> None:
    port = choose_port(None)
    with Exposition(run, port, "setformer_nano") as exposed:
        assert values(parsed(scraped(port))["setformer_up"]) == {"": 0}
        Board(run, exposed.look).look(RANKS)
        found = parsed(scraped(port))
        for name, value in {"up": 1, "step": 12, "loss": 1.25, "images_per_second": 101, "ranks": 2, "hosts": 2,
                            "attempts": 2, "bad_steps": 1, "checkpoint_step": 10}.items():  # fmt: skip
            assert values(found[f"setformer_{name}"]) == {"": value}, name
        assert found["setformer_checkpoint_age_seconds"].samples[0].value == pytest.approx(100, abs=20)
        assert values(found["setformer_failures"], "how") == {"killed": 1}
        assert values(found["setformer_evaluation"], "metric") == {"top1": 0.75, "loss": 1.2}
        assert values(found["setformer_rank_step"]) == {"0": 12, "1": 11}
        assert values(found["setformer_rank_data_wait_ratio"]) == {"0": 0, "1": 1}
        assert values(found["setformer_rank_memory_bytes"]) == {"0": 512 * 2**20, "1": 512 * 2**20}
        assert values(found["setformer_rank_busy_cores"]) == {"0": 1.5}
        assert values(found["setformer_rank_gpu_busy_ratio"]) == {"0": 0.9}
        assert [sample.labels["host"] for sample in found["setformer_rank_step"].samples] == ["a", 'b"\\\n']
        with (run / "metrics.jsonl").open("a") as file:  # the rest of the line
            file.write('ss": 1.0}\n')
        ledger.record(run, "attempt", number=3, ranks=2)
        found = parsed(scraped(port))
        assert values(found["setformer_loss"]) == {"": 1.0}
        assert values(found["setformer_attempts"]) == {"": 3}
    with pytest.raises(OSError, match="refused"):
        scraped(port)


def test_it_listens_on_the_loopback_interface_alone(run: Path) -> None:
    port = choose_port(None)
    with Exposition(run, port, "m"):
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]
                     if line.split()[3] == "0A"]  # fmt: skip
        assert f"0100007F:{port:04X}" in listening
        assert f"00000000:{port:04X}" not in listening
    with Exposition(run, f"0.0.0.0:{port}", "m"):
        assert "setformer_up" in scraped(port)


def test_a_port_in_use_is_one_sentence(run: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(LaunchError, match=f"127.0.0.1 port {port} cannot be used"):
            Exposition(run, port, "m")
    with pytest.raises(LaunchError, match=r"192\.0\.2\.1 port 9400 cannot be used"):
        Exposition(run, "192.0.2.1:9400", "m")


def test_the_file_is_whole_and_ends_with_a_run_that_is_not_up(run: Path) -> None:
    with Exposition(run, "file", "m") as exposed:
        assert not (run / TEXT_FILE).exists(), "nothing is written before the run's folder is held"
        Board(run, exposed.look).look(RANKS)
        found = parsed((run / TEXT_FILE).read_text())
        assert values(found["setformer_up"]) == {"": 1}
        assert values(found["setformer_rank_step"]) == {"0": 12, "1": 11}
    found = parsed((run / TEXT_FILE).read_text())
    assert values(found["setformer_up"]) == {"": 0}
    assert not found["setformer_rank_step"].samples
    assert values(found["setformer_step"]) == {"": 12}


def test_names_in_records_that_no_text_can_hold_are_written_out(run: Path) -> None:
    """A name of bytes that are no UTF-8 would end the supervisor, and with it the training."""
    row = {"kind": "eval", "step": 11, "half\udc80": 0.5, 'a" 1}\nsetformer_step 7': 0.25, "x" * 5_000: 0.75}
    text = (run / "metrics.jsonl").read_text().rpartition("\n")[0]
    (run / "metrics.jsonl").write_text(f"{text}\n{json.dumps(row)}\n")
    ledger.record(run, "ended", why="lost \udc81", step=9)
    with Exposition(run, "file", "m") as exposed:
        Board(run, exposed.look).look([Rank(0, Beat(9, 12, "forward", 0.1), "node\udc82")])
        found = parsed((run / TEXT_FILE).read_text())
    assert values(found["setformer_evaluation"], "metric") == {
        "half\\udc80": 0.5, 'a" 1}\nsetformer_step 7': 0.25, "x" * 200: 0.75,
    }  # fmt: skip
    assert values(found["setformer_failures"], "how") == {"killed": 1, "lost \\udc81": 1}
    assert [sample.labels["host"] for sample in found["setformer_rank_step"].samples] == ["node\\udc82"]


def test_nothing_is_written_into_a_folder_that_is_lost(run: Path) -> None:
    exposed = Exposition(run, "file", "m")
    Board(run, exposed.look).look(RANKS)
    (run / TEXT_FILE).unlink()
    error = FolderLostError("gone")
    exposed.__exit__(type(error), error, None)
    assert not (run / TEXT_FILE).exists()


DAMAGED = ("", "{\n", "[]\n", "null\n", '{"kind": "train", "step": "x", "loss": 1e999}\n', "\0\n")


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_records_are_passed_over(run: Path, text: str) -> None:
    for name in ("metrics.jsonl", "ledger.jsonl"):
        (run / name).write_text(text)
    port = choose_port(None)
    with Exposition(run, port, "m"):
        assert values(parsed(scraped(port))["setformer_attempts"]) == {"": 0}


def test_names_follow_the_advice_of_prometheus(run: Path) -> None:
    """The rules of `promtool check metrics`: help, base units, suffixes, no types in names."""
    port = choose_port(None)
    with Exposition(run, port, "m") as exposed:
        Board(run, exposed.look).look(RANKS)
        text = scraped(port)
    samples = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")}
    for name, family in parsed(text).items():
        assert family.documentation.endswith("."), name
        assert re.fullmatch(r"setformer_[a-z0-9_]+", name), name
        assert not re.search(r"_(gauge|counter|total|count|sum|bucket|milliseconds|ms|mib|kb|percent)$", name), name
        assert (f"{name}_total" in samples) == (family.type == "counter"), name
        keys = [tuple(sorted(sample.labels.items())) for sample in family.samples]
        assert len(set(keys)) == len(keys), name
        assert all("run" in sample.labels for sample in family.samples), name


@pytest.mark.parametrize("value", [9400, "9400", "10.0.0.1:9400", "[::1]:9400", "file", ""])
def test_places_that_can_be(value: int | str) -> None:
    assert LoggingConfig(prometheus=value).prometheus == value


@pytest.mark.parametrize("value", ["0", "70000", "-1", "true", "yes", "a:b", '"10.0.0.1"', '"files"', "1.5"])
def test_places_that_cannot_be(value: str) -> None:
    page = Path(__file__).parent.parent.parent / "configs" / "runs" / "demo.toml"
    with pytest.raises(ConfigError, match=r"logging\.prometheus"):
        load_run(page, [f"logging.prometheus={value}"])
