"""The words of `setformer queue`, in this process; what they cause is in the other tests of the queue."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import sqlalchemy as sa

from launch.cli import main as cli
from launch.queue import schema as db
from launch.queue.store import Store, url_of
from setformer_dist.core.errors import LaunchError, SetformerError


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A queue without a server, of five nodes."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "q"
    folder.mkdir()
    nodes = ", ".join(f"node{n} = 8" for n in range(5))
    (folder / "queue.toml").write_text(f'[cluster]\nkind = "hosts"\nnodes = {{{nodes}}}\n')
    monkeypatch.setenv("SETFORMER_QUEUE", str(folder))
    monkeypatch.setattr("launch.queue.serve.ensure_server", lambda *_: None)
    with (store := Store(url_of(folder))).write() as connection:
        connection.execute(sa.insert(db.nodes), [{"name": f"node{n}", "slots": 8, "up": True} for n in range(5)])
    store.close()
    return folder


def run(words: str) -> None:
    cli.app(shlex.split(words), standalone_mode=False)


def test_every_command(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("queue submit demo data.root=runs/demo-data --ranks 2")
    run("queue submit demo data.root=runs/demo-data --ranks 1:2 run.name=b --name <b>")
    run("queue submit imagenet_base --nodes 4 --ranks-per-node 8 --priority 5 --time-limit 2d")
    assert capsys.readouterr().out.split("\n") == ["job 1", "job 2", "job 3", ""]
    run("queue ls --json")
    listed = json.loads(capsys.readouterr().out)
    assert [(row["id"], row["sizes"], row["limit_s"]) for row in listed] == [
        (3, [32], 172800.0), (1, [2], None), (2, [1, 2], None),
    ]  # fmt: skip
    for words in ("queue hold 1", "queue release 1", "queue move 1 --priority 5", "queue ls", "queue ls --all",
                  "queue show 1", "queue logs 1", "queue top --once", "queue events",
                  'queue drain node3 --why "new memory"',
                  'queue drain node3 --why "new memory" --vacate', "queue undrain node3", "queue cancel 1",
                  "queue backup queue-copy.db", "queue check"):  # fmt: skip
        run(words)
        assert capsys.readouterr().out.strip() or "logs" in words, words
    assert Store(url_of(queue)).job(1)["cancelled"]
    assert (queue.parent / "queue-copy.db").is_file()


def test_a_config_that_changes_after_submission_does_not_matter(queue: Path) -> None:
    page = queue.parent / "mine.toml"
    page.write_text(f'extends = "{Path(cli.__file__).parents[2]}/configs/runs/demo.toml"\n[run]\nname = "mine"\n')
    run("queue submit mine.toml")
    page.write_text("broken = [")
    assert json.loads(Store(url_of(queue)).job(1)["config"])["run"]["name"] == "mine"


def test_a_queue_that_is_no_folder_is_one_sentence(queue: Path) -> None:
    (queue.parent / "file").write_text("x")
    with pytest.raises(Exception, match="is no folder"):
        run("queue ls --queue file")
    with pytest.raises(LaunchError, match="the queue has no job 7"):
        run("queue show 7")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--ranks 1 budget.ranks=2", "--ranks 1 has no room for one trial, which takes 2 slots"),
        ("--nodes 1 --ranks-per-node 1", "a sweep has no --nodes"),
        ("space.nothing=3", "space"),
    ],
)
def test_sweeps_that_no_queue_can_run(queue: Path, words: str, said: str) -> None:
    with pytest.raises(SetformerError, match="has no Ray, which a sweep needs"):
        run("queue submit digits --sweep")
    (queue / "queue.toml").write_text("[cluster]\nslots = 8\n")
    with pytest.raises(SetformerError, match=re.escape(said)):
        run(f"queue submit digits --sweep {words}")
    run("queue submit digits --sweep --ranks 2:4 budget.ranks=2")
    run("queue submit digits --sweep set.data.root=runs/demo-data --ranks 2 sweep.name=other")
    job = Store(url_of(queue)).job(1)
    assert (job["kind"], job["sizes"], job["name"]) == ("sweep", [2, 3, 4], "digits")


def test_a_long_name_does_not_push_the_other_columns_away(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"queue submit demo --name {'x' * 255}")
    capsys.readouterr()
    for words in ("queue ls", "queue top --once"):
        run(words)
        assert f"{'x' * 39}… " in capsys.readouterr().out.replace("│", " ")
    run("queue show 1")
    assert capsys.readouterr().out.count("x") >= 255
