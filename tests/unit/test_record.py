"""The record of an attempt: what it says of code, machine and environment, and what it never says."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch.cli import main
from launch.history import ran
from launch.record import attempts
from launch.record.attempts import FOLDER, Recorder
from launch.record.checkout import checkout_of, codes_of, places_of
from launch.record.differ import differing
from launch.record.machine import driver, gpu_names, machine_facts, mattering
from launch.run.config import RunConfig, load_run
from launch.run.repeat import data_differs, repetition
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import write_state
from setformer_dist.core.secrets import names_secret, redacted_source, redacted_words

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "configs" / "runs").glob("*.toml"))
SECRET = "sEcReT-0123456789"


def git(folder: Path, *words: str) -> str:
    names = ["-c", "user.name=someone", "-c", "user.email=someone@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a package, committed."""
    folder = tmp_path / "project"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "__init__.py").write_text("WIDTH = 16\n")
    (folder / ".gitignore").write_text(".venv/\n")
    git(folder, "init", "--quiet", "--initial-branch=trunk")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


def test_a_clean_repository_is_a_commit_and_a_branch(repository: Path) -> None:
    git(repository, "remote", "add", "origin", f"https://someone:{SECRET}@example.org/mine.git")
    found = checkout_of(repository / "mine")
    assert found is not None
    assert found.diff is None
    assert found.state == {
        "commit": git(repository, "rev-parse", "HEAD"),
        "branch": "trunk",
        "remote": "https://example.org/mine.git",
        "dirty": False,
        "diff": None,
        "masked": False,
    }


def test_the_diff_of_changed_and_new_code_makes_the_same_tree_again(repository: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repository), str(clone))
    (repository / "mine" / "__init__.py").write_text("WIDTH = 32\nNAME = 'ä'\n")
    (repository / "mine" / "new file.py").write_text("print('new')\n")
    (repository / "notes.txt").write_text("no code")
    found = checkout_of(repository / "mine" / "__init__.py")
    assert found is not None
    assert found.diff is not None
    assert found.state["dirty"]
    assert not found.state["masked"]
    (tmp_path / "found.diff").write_text(found.diff)
    git(clone, "apply", str(tmp_path / "found.diff"))
    for name in ("mine/__init__.py", "mine/new file.py"):
        assert (clone / name).read_bytes() == (repository / name).read_bytes()
    assert not (clone / "notes.txt").exists()
    again = checkout_of(repository)
    assert again is not None
    assert again.state["diff"] == found.state["diff"]
    (repository / "mine" / "__init__.py").write_text("WIDTH = 33\n")
    other = checkout_of(repository)
    assert other is not None
    assert other.state["diff"] != found.state["diff"]


def test_a_diff_holds_no_secret(repository: Path) -> None:
    token = "hf_" + "abcdefghijklmnopqrstuvwxyz"
    (repository / "mine" / "__init__.py").write_text(
        f'API_KEY = "{SECRET}"\nheaders = {{"auth_token": \'{SECRET}\'}}\nurl = "https://u:{SECRET}@host/a?sig={SECRET}"\n'
        f"other = '{token}'\nmonkey = 'bananas-and-more'\n"
    )
    found = checkout_of(repository)
    assert found is not None
    assert found.diff is not None
    assert SECRET not in found.diff
    assert token not in found.diff
    assert "bananas-and-more" in found.diff
    assert found.state["masked"]


def test_a_repository_without_commits_and_a_large_diff(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "big.py").write_text("x = 1\n" * 100_000)
    found = checkout_of(tmp_path)
    assert found is not None
    assert found.state["commit"] is None
    assert found.state["dirty"]
    assert found.state["diff"]
    assert found.diff is None, "a large diff is not kept"


def test_what_a_repository_ignores_is_not_of_it_and_no_repository_is_no_state(repository: Path, tmp_path: Path) -> None:
    installed = repository / ".venv" / "site-packages" / "other"
    installed.mkdir(parents=True)
    assert checkout_of(installed) is None
    (tmp_path / "plain").mkdir()
    assert checkout_of(tmp_path / "plain") is None


def test_without_git_there_is_no_state(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(repository))
    assert checkout_of(repository) is None


def test_a_repository_cannot_have_git_run_its_programs(repository: Path, tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    program.chmod(0o755)
    for key in ("core.fsmonitor", "diff.external", "core.pager"):
        git(repository, "config", key, str(program))
    (repository / "mine" / "__init__.py").write_text("WIDTH = 32\n")
    found = checkout_of(repository)
    assert found is not None
    assert found.state["dirty"]
    assert not (tmp_path / "ran").exists()


def test_modules_are_found_without_being_imported(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "mine" / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(repository)
    assert places_of(["mine.models", "mine", "nosuch", "sys"]) == {
        "mine": repository / "mine", "nosuch": None, "sys": None,
    }  # fmt: skip
    assert not (tmp_path / "ran").exists()


def test_variables_that_matter_and_no_secrets() -> None:
    found = mattering(
        {
            "OMP_NUM_THREADS": "2",
            "NCCL_SOCKET_IFNAME": "eth0",
            "SLURM_JOB_ID": "7",
            "SLURM_JWT": SECRET,
            "WANDB_API_KEY": SECRET,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "SETFORMER_HEARTBEAT_FD": "5",
            "TORCH_HOME": f"https://u:{SECRET}@host/a",
            "HOME": "/root",
        }
    )
    assert found == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JWT": None,
        "TORCH_HOME": "https://host/a",
    }


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "SLURM_JWT", "db.password", "api-key"])
def test_names_of_secrets(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "NCCL_DEBUG", "monkey", "model.args.keys_per_head", "tokens"])
def test_names_of_no_secrets(name: str) -> None:
    assert not names_secret(name)


def test_a_command_without_secrets() -> None:
    words = [
        "setformer",
        "train",
        f"run.callback_args.x.api_key={SECRET}",
        "--token",
        SECRET,
        f"data.root=http://a:{SECRET}@h/",
    ]
    assert redacted_words(words) == [
        "setformer", "train", "run.callback_args.x.api_key=***", "--token", "***", "data.root=http://h/",
    ]  # fmt: skip
    assert redacted_source("key = sorted(names)") == "key = sorted(names)"


def test_names_and_driver_of_gpus_as_the_driver_tells_them(tmp_path: Path) -> None:
    for at in range(2):
        (tmp_path / "gpus" / f"0000:0{at}:00.0").mkdir(parents=True)
        (tmp_path / "gpus" / f"0000:0{at}:00.0" / "information").write_text(
            "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n"
        )
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\nGCC version: 12.2.0\n"
    )
    assert gpu_names(tmp_path) == ["NVIDIA H100 80GB HBM3"] * 2
    assert driver(tmp_path) == "570.86.15"
    assert driver(tmp_path / "nothing") is None


def test_records_are_numbered_and_a_damaged_one_counts_as_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path, env=("MY_TOKEN", f"OTHER={SECRET}"))
    recorder.write(2, {})
    alike = {"host": "x", "environment": {}, "versions": {"torch": "1"}}
    recorder.write(4, {"a": (2, alike), "b": (2, {**alike, "host": "y"}), "c": (1, {})})
    found = attempts.last(tmp_path)
    assert found is not None
    assert (found.attempt, found.ranks, list(found.hosts)) == (2, 4, ["a", "b", "c"])
    assert len(found.machines) == 2, "machines that are alike are written once"
    assert found.hosts["b"].host == "y"
    assert found.machine("b")["versions"] == {"torch": "1"}
    assert found.launch_env == ["MY_TOKEN", "OTHER"]
    assert all(SECRET.encode() not in path.read_bytes() for path in (tmp_path / FOLDER).iterdir())
    path = tmp_path / FOLDER / "attempt-00002.json"
    path.write_text(path.read_text().replace('"ranks": 4', '"ranks": 5'))
    assert (before := attempts.last(tmp_path)) is not None
    assert before.attempt == 1
    assert "does not match its own digest" in caplog.text
    write_state(path, {"hosts": 3})
    assert attempts.read(tmp_path, 2) is None
    recorder.write(2, {})
    assert attempts.numbers(tmp_path) == [1, 2, 3]
    assert any("host" in line for line in ran.lines(tmp_path))


def test_code_of_a_host_that_is_in_another_state_is_shown(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    here = codes_of(["mine"])
    assert here["mine"]["git"]["branch"] == "trunk"
    git(repository, "switch", "--quiet", "--create=other")
    there = codes_of(["mine"])
    assert there["mine"]["files"] == here["mine"]["files"]
    (repository / "mine" / "more.py").write_text("")
    assert codes_of(["mine"])["mine"]["files"] != here["mine"]["files"]
    (repository / "mine" / "more.py").unlink()
    git(repository, "switch", "--quiet", "trunk")
    Recorder(tmp_path, imports=("mine",)).write(2, {"a": (1, {"codes": here}), "b": (1, {"codes": there})})
    lines = list(ran.lines(tmp_path))
    commit = git(repository, "rev-parse", "HEAD")[:12]
    [line] = [line for line in lines if " there: " in line]
    assert line == f"    code of mine there: commit {commit} on other"
    assert lines[lines.index(line) - 1].startswith("  host b: ")


def test_a_record_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FOLDER).write_text("in the way")
    Recorder(tmp_path).write(1, {})
    assert "cannot be written" in caplog.text
    assert attempts.last(tmp_path) is None


def test_what_differs_is_said_thing_by_thing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path)
    then, _ = recorder.made(2, {})
    assert differing(then, then) == []
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    facts = machine_facts()
    facts["versions"] = {**facts["versions"], "torch": "0.1"}
    now, _ = recorder.made(3, {"a": (3, facts)})
    lines = differing(then, now)
    here = facts["host"]
    torch = then.first_machine["versions"]["torch"]
    assert lines == [
        f"torch: {torch} then, 0.1 now",
        "ranks: 2 then, 3 now",
        f"hosts: {here} then, a now",
        "NCCL_DEBUG: not set then, INFO now",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_config_of_a_run_is_a_page_that_means_the_same(page: Path, tmp_path: Path) -> None:
    config = load_run(page)
    write_state(tmp_path / "config.json", {**config.model_dump(mode="json"), "resolved": {"world_size": 4}})
    assert load_run(tmp_path / "config.json") == config
    repeated = repetition(tmp_path, ["run.seed=7"])
    assert repeated.world_size == 4
    assert repeated.config == config.model_copy(update={"run": config.run.model_copy(update={"seed": 7})})


def a_run(out: Path) -> Path:
    """Make the folder of a run as it begins."""
    config = load_run(ROOT / "configs" / "runs" / "demo.toml", [f"run.out={out}"])
    (out / "demo").mkdir(parents=True)
    write_state(
        out / "demo" / "config.json", {**config.model_dump(mode="json"), "resolved": {"data": {"training": "a"}}}
    )
    return out / "demo"


def test_a_repetition_takes_the_first_free_name(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert repetition(run, []).config.run.name == "demo-2"
    (tmp_path / "demo-2").mkdir()
    assert repetition(run, []).config.run.name == "demo-3"
    assert repetition(run, ["run.name=mine"]).config.run.name == "mine"


def test_other_data_are_told(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    repeated = repetition(run, [])
    repeated.path.parent.mkdir()
    repeated.write_config()
    folder = repeated.config.folder
    assert isinstance(load_run(folder / "repeated.json"), RunConfig)
    assert data_differs(folder, {"training": "a"}) == []
    assert data_differs(folder, {"training": "b"}) == [
        f"training data are not those of {run}: fingerprint a then, b now"
    ]
    assert data_differs(run, {"training": "b"}) == []


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"run": 3}'])
def test_what_is_no_run_cannot_be_repeated(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        repetition(tmp_path, [])


def test_an_old_run_is_repeated_as_it_was_trained(tmp_path: Path) -> None:
    config = load_run(ROOT / "configs" / "runs" / "demo.toml", ["model.name=soft_tiny"]).model_dump(mode="json")
    config["model"]["args"].pop("soft", None)
    write_state(tmp_path / "config.json", config)
    assert repetition(tmp_path, []).config.model.args["soft"] == {"query_scale": "after"}


def test_a_name_that_is_no_text_is_recorded(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"mine/\xff.py")
    (repository / name).write_text("x = 1\n")
    monkeypatch.chdir(repository)
    Recorder(tmp_path, ("mine",)).write(1, {})
    found = attempts.last(tmp_path)
    assert found is not None
    assert json.dumps(found.imports["mine"])


def test_a_repetition_takes_the_hosts_and_ranks_of_the_run_unless_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    run = a_run(tmp_path)
    Recorder(run, via="docker exec -i {host}").write(6, {"a": (4, {}), "b": (2, {})})
    nothing = (None, "", None, "", "")
    began = main._from_run(run, "optim.lr=2e-3", ["~schedule.epochs", "schedule.steps=3"], nothing, None, trust=True)
    assert [(spec.name, spec.slots) for spec in began.specs] == [("a", 4), ("b", 2)]
    assert (began.world_size, began.via) == (6, "docker exec -i {host}")
    assert began.config.optim.lr == 2e-3
    assert began.config.schedule.steps == 3
    assert began.path == tmp_path / "demo-2" / "repeated.json"
    assert not began.path.exists(), "nothing is written before the folder is held"
    here = main._from_run(run, None, [], (3, "", None, "", ""), None, trust=False)
    assert (here.specs, here.world_size, here.via) == ([], 3, None)
    other = main._from_run(run, None, [], (None, "c:1", None, "", ""), "ssh", trust=False)
    assert [spec.name for spec in other.specs] == ["c"]
