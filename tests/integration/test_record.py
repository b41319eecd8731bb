"""Who ran a run: recorded for each attempt, printed, repeated, and without any secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from launch.record import attempts
from launch.record.attempts import Recorder
from launch.run.config import load_run
from launch.testing.commands import DEMO, losses, setformer, train_words
from setformer_dist.core import ledger
from setformer_dist.core.files import write_state
from tests.unit.test_record import SECRET, git

# Kills its rank once, so that there are two attempts.
MINE = """
import os, signal
from pathlib import Path
from setformer_dist.callbacks.build import register_callback
from setformer_dist.core.callback import Callback

class Once(Callback):
    def on_step_end(self, step):
        if step == 8 and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

register_callback("once", lambda args: Once())
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "mine_once.py").write_text(MINE)
    (folder / ".gitignore").write_text("killed\n__pycache__\n")
    git(folder, "init", "--quiet", "--initial-branch=trunk")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


@pytest.mark.drill
def test_a_run_says_who_ran_it_and_is_repeated(
    digits: Path, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MY_TOKEN", "SLURM_JWT", "WANDB_API_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    out = tmp_path / "runs"
    own = ['run.imports=["mine_once"]', 'run.callbacks=["once"]', 'launch.env=["MY_TOKEN"]', "restart.backoff_s=0.1",
           "logging.prometheus=file"]  # fmt: skip
    ended = setformer(*train_words(digits, out, *own), cwd=project)
    assert ended.code == 0, ended.err
    run = out / "demo"
    assert attempts.numbers(run) == [1, 2]
    record = attempts.last(run)
    assert record is not None
    commit = git(project, "rev-parse", "HEAD")
    assert record.imports["mine_once"] is not None
    assert record.imports["mine_once"]["commit"] == commit
    assert not record.imports["mine_once"]["dirty"]
    assert record.environment["NCCL_DEBUG"] == "WARN"
    assert record.launch_env == ["MY_TOKEN"]

    figures = {family.name: family for family in text_string_to_metric_families((run / "metrics.prom").read_text())}
    assert [sample.value for sample in figures["setformer_step"].samples] == [22]
    assert [sample.value for sample in figures["setformer_attempts"].samples] == [2]
    assert [(s.labels["how"], s.value) for s in figures["setformer_failures"].samples] == [("killed", 1)]
    saved = [event["step"] for event in ledger.read_events(run) if event["event"] == "saved"]
    assert saved[-1] == 22
    assert 5 in saved

    assert "2 attempts, 1 fault, " in (run / "report.html").read_text()

    shown = setformer("runs", "show", str(run))
    for part in ("attempt 2, ", "torch ", commit[:12], "NCCL_DEBUG=WARN", "SLURM_JWT=(not written)", "2 ranks"):
        assert part in shown.out
    assert len(json.loads(setformer("runs", "show", str(run), "--json").out)["attempt_records"]) == 2

    (project / "mine_once.py").write_text(MINE + "\n# changed\n")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    asked = setformer("train", "--from", str(run), cwd=project)
    assert asked.code == 2
    assert 'run.imports = ["mine_once"]; launch.env = ["MY_TOKEN"]: read them, then add --trust' in asked.err
    assert not (out / "demo-2").exists()
    again = setformer("train", "--from", str(run), "data.val=train", "--trust", cwd=project)
    assert again.code == 0, again.err
    said = " ".join(again.err.split())
    assert "code of mine_once: commit" in said
    assert "NCCL_DEBUG: WARN then, INFO now" in said
    assert f"validation data are not those of {run}" in said
    assert "training data" not in said
    other = out / "demo-2"
    assert train_losses(other) == train_losses(run)
    assert (found := attempts.last(other)) is not None
    assert found.repeats == str(run)
    assert found.ranks == 2
    assert (other / "attempts" / f"{found.imports['mine_once']['diff'][:16]}.diff").is_file()

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    assert SECRET not in ended.out + ended.err + shown.out + again.out + again.err


def train_losses(run: Path) -> dict[int, float]:
    return {step: loss for (kind, step), (loss, _) in losses(run).items() if kind == "train"}


def run_of_somebody(folder: Path, digits: Path, marker: Path, *overrides: str, **record: object) -> Path:
    """Write the folder of a run that would run `marker`'s maker on who repeats it."""
    config = load_run(Path(DEMO), [f"data.root={digits}", f"run.out={folder.parent / 'new'}", *overrides])
    (folder / "attempts").mkdir(parents=True)
    write_state(folder / "config.json", {**config.model_dump(mode="json"), "resolved": {"world_size": 1}})
    made, _ = Recorder(folder).made(2, {"near": (2, {})})
    write_state(
        folder / "attempts" / "attempt-00001.json", {**made.model_dump(), "attempt": 1, "several": False, **record}
    )
    (folder.parent / "intruder.py").write_text(f"open({str(marker)!r}, 'w')\n")
    return folder


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (['run.imports=["intruder"]'], 'run.imports = ["intruder"]'),
        (["data.root=https://someone.example/shards"], 'data.root = "https://someone.example/shards"'),
        (["checkpoint.mirror=s3://theirs/runs"], 'checkpoint.mirror = "s3://theirs/runs"'),
        (["model.weights=hf-hub:theirs/model"], 'model.weights = "hf-hub:theirs/model"'),
        (["logging.prometheus=0.0.0.0:9400"], 'logging.prometheus = "0.0.0.0:9400"'),
        (["refresh.address=ray.invalid:6379"], 'refresh.address = "ray.invalid:6379"'),
        (["logging.mlflow.tracking_uri=https://theirs"], 'logging.mlflow.tracking_uri = "https://theirs"'),
        (["logging.wandb.project=theirs"], 'logging.wandb.project = "theirs"'),
        (['launch.env=["LD_PRELOAD=/tmp/x.so"]'], 'launch.env = ["LD_PRELOAD=/tmp/x.so"]'),
        (["deepspeed.comms_logger.enabled=true"], "deepspeed.comms_logger.enabled = true"),
    ],
)
def test_a_repeated_run_uses_nothing_outside_without_the_users_word(
    digits: Path, tmp_path: Path, overrides: list[str], named: str
) -> None:
    marker = tmp_path / "ran"
    run = run_of_somebody(tmp_path / "theirs", digits, marker, *overrides)
    for more in ((), ("--dry-run",)):
        ended = setformer("train", "--from", str(run), *more, cwd=tmp_path)
        assert ended.code == 2
        assert len(ended.error_lines) == 1
        assert f"only if you say so: {named}: read them, then add --trust" in ended.error_lines[0]
    assert not marker.exists()
    assert not (tmp_path / "new").exists()


def test_hosts_and_commands_of_a_record_are_not_used_without_the_users_word(digits: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    run = run_of_somebody(
        tmp_path / "theirs", digits, marker, via=f"sh -c 'touch {marker}' {{host}}", several=True,
        hosts={"node1": {"ranks": 2, "machine": 0}},
    )  # fmt: skip
    ended = setformer("train", "--from", str(run), cwd=tmp_path)
    assert ended.code == 2
    assert 'hosts ["node1"]; --via "sh -c ' in ended.error_lines[0]
    assert not marker.exists()
    ended = setformer("train", "--from", str(run), "--trust", cwd=tmp_path)
    assert ended.code == 5
    assert marker.exists(), "the record's command is used once the user has said so"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--from", "nosuch"], "nosuch is no run folder, as it holds no config.json"),
        (["demo", "--from", "nosuch"], "leave the config demo out"),
        ([], "Missing argument 'CONFIG': name the run's TOML config, or --from"),
    ],
)
def test_what_cannot_be_repeated_is_said_in_one_line(words: list[str], says: str, tmp_path: Path) -> None:
    ended = setformer("train", *words, cwd=tmp_path)
    assert ended.code in (2, 5)
    assert len(ended.error_lines) == 1
    assert says in ended.error_lines[0]
    assert not list(tmp_path.iterdir())
    assert not ledger.read_events(tmp_path)
