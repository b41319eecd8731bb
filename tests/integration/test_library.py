"""Runs from Python: bit by bit those of the command line, on any ranks, with models and augmentations of one's own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import setformer
from launch.testing.commands import DEMO, ROOT, SHORT, environment, losses, module
from launch.testing.commands import setformer as command
from setformer import Callback
from setformer_dist.core.errors import CheckpointError, ConfigError, LaunchError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.tasks import build
from setformer_dist.tasks.classification import Classification
from tests.integration.library_runs import LENGTH, Tiny, config_of

PROGRAM = "tests.integration.library_runs"


def sample_lines(run: Path) -> dict[int, str]:
    """Return the lines of samples.jsonl by step; the last of a step counts."""
    lines = (run / "samples.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: line for line in lines}


def test_a_run_in_pieces_is_the_commands_run_bit_by_bit(digits: Path, tmp_path: Path) -> None:
    words = ["train", DEMO, *SHORT, *LENGTH, f"data.root={digits}", f"run.out={tmp_path / 'command'}"]
    ended = command(*words, "--ranks", "1")
    assert ended.code == 0, ended.err
    said = module(PROGRAM, "in_pieces", str(digits), str(tmp_path / "library"))
    assert said.code == 0, said.err
    theirs, ours = tmp_path / "command" / "demo", tmp_path / "library" / "demo"
    assert losses(ours) == losses(theirs)
    assert sample_lines(ours) == sample_lines(theirs)
    shard = Path("checkpoints/step-00000007/rank-00000-of-00001.safetensors")
    assert (ours / shard).read_bytes() == (theirs / shard).read_bytes()
    assert (ours / "deepspeed.json").read_text() == (theirs / "deepspeed.json").read_text()
    figures = [json.loads((run / "summary.json").read_text()) for run in (ours, theirs)]
    assert figures[0]["evaluation"] == figures[1]["evaluation"]
    assert figures[0]["finished"] is True


def test_a_module_is_a_template_and_its_code_is_given_again(digits: Path, tmp_path: Path) -> None:
    said = module(PROGRAM, "own_model", str(digits), str(tmp_path))
    assert said.code == 0, said.err
    given, other = said.out.splitlines()[-2:]
    assert "its code (Tiny) was given to the run as an object, and no file holds it: give it again from Python" in given
    assert "the model that was passed has other parameters than checkpoint" in other
    shown = command("runs", "show", str(tmp_path / "demo"))
    assert shown.code == 0, shown.err
    assert "ZeroDivisionError" in shown.out or "error" in shown.out
    refused = command("eval", str(tmp_path / "demo"))
    assert (refused.code, len(refused.error_lines)) == (CheckpointError.exit_code, 1), refused.err
    mixed = command("train", DEMO, *SHORT, *LENGTH, f"data.root={digits}", f"run.out={tmp_path}")
    assert mixed.code == ConfigError.exit_code
    assert "holds a run of another config" in mixed.err


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_what_does_not_train_is_in_checkpoints_and_buffers_are_checked(
    digits: Path, tmp_path: Path, stage: int
) -> None:
    said = module(PROGRAM, f"odd_model_{stage}", str(digits), str(tmp_path))
    assert said.code == 0, said.err
    resumed, loaded = said.out.splitlines()[-2:]
    for line in (resumed, loaded):
        assert "the buffers of the model that was passed are not those that checkpoint" in line


def test_models_that_change_what_trains_and_unusual_ones(digits: Path, tmp_path: Path) -> None:
    said = module(PROGRAM, "unusual", str(digits), str(tmp_path))
    assert said.code == 0, said.err
    text = said.out.splitlines()
    for line in (
        "parameter body.0.weight does not train now, and did when the run began",
        "the loss of task classification does not depend on any parameter that trains",
        "its method loss must return a tensor of shape (), and returned (16,)",
    ):
        assert any(line in printed for printed in text), said.out


def test_data_sets_in_python_with_soft_labels_train_and_resume(tmp_path: Path) -> None:
    said = module(PROGRAM, "own_data", "", str(tmp_path))
    assert said.code == 0, said.err
    assert "fingerprint" in said.out.splitlines()[-1]
    steps = [step for kind, step in losses(tmp_path / "demo") if kind == "train"]
    assert steps == list(range(1, 8))


@pytest.mark.drill
def test_ranks_of_torchrun_train_the_same(digits: Path, tmp_path: Path) -> None:
    assert module(PROGRAM, "own_model", str(digits), str(tmp_path / "one")).code == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, "-m", PROGRAM, "own_model", str(digits), str(tmp_path / "two")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    alone, together = losses(tmp_path / "one" / "demo"), losses(tmp_path / "two" / "demo")
    assert alone.keys() == together.keys()
    assert all(abs(alone[key][0] - together[key][0]) < 1e-5 for key in alone)
    assert sample_lines(tmp_path / "one" / "demo") == sample_lines(tmp_path / "two" / "demo")


class Wide(Tiny):
    """One output too many."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs + 1)


class Normed(Tiny):
    """Keeps running statistics."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.body.insert(0, nn.BatchNorm2d(3))


class Fixed(nn.Module):
    """Takes no number of outputs."""

    def __init__(self) -> None:
        super().__init__()


class Spectral(Tiny):
    """A layer that changes its buffers."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.head = nn.utils.parametrizations.spectral_norm(self.head)


class Complexes(Tiny):
    """A parameter that no optimizer here takes."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.phases = nn.Parameter(torch.ones(3, dtype=torch.complex64))


class Sparse(Tiny):
    """A layer with sparse gradients."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.words = nn.Embedding(7, 3, sparse=True)


class Empty(Tiny):
    """A parameter without elements."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.none = nn.Parameter(torch.empty(0, 3))


class Unsized(Tiny):
    """A layer that waits for its first batch."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.head = nn.LazyLinear(outputs)


def fails(outputs: int) -> nn.Module:
    return nn.Linear(7, outputs)


@pytest.mark.parametrize(
    ("model", "tables", "said"),
    [
        (Wide, {}, r"model Wide makes \(1, 11\) of one sample, and task classification on this data needs \(1, 10\)"),
        (Normed, {}, r"model Normed keeps running statistics \(body.0.num_batches_tracked"),
        (fails, {}, r"model fails does not take a batch of shape \(1, 3, 16, 16\): RuntimeError"),
        (
            "resnet50d",
            {},
            "must be a torch.nn.Module or a function .*: a registered name belongs into model.name",
        ),
        (Fixed, {}, r"model Fixed cannot be made as Fixed\(10\): TypeError: .* takes 1 positional argument"),
        (lambda outputs: 3, {}, "is no torch.nn.Module with parameters that are trained"),
        (Tiny, {"model": {"drop_path": 0.1}}, "model.drop_path applies only to models that are built by name"),
        (Tiny, {"model": {"activation_checkpointing": True}}, "to have set_grad_checkpointing"),
        (
            Tiny,
            {"model": {"args": {"depths": [1]}}},
            r'remove it, from Python by load_config\(..., "~model.args"\)',
        ),
        (
            Tiny,
            {"model": {"args": {"depths": [1]}, "drop_path": 0.1}},
            r'args and model.drop_path apply .* remove them, .*, "~model.args", "~model.drop_path"\)',
        ),
        (Spectral, {}, r"model Spectral changes its buffer head.parametrizations.weight.0._u in a forward pass"),
        (Complexes, {}, r"model Complexes: phases is complex64, and optimizers take real numbers"),
        (Sparse, {}, r"model Sparse: words has sparse gradients, .*: set sparse=False"),
        (Empty, {}, r"model Empty: none has no elements"),
        (Unsized, {}, r"model Unsized: head.weight has no size yet: give its layer sizes"),
        (torch.jit.script(Tiny(10)), {}, r"is compiled by torch.jit: pass the module itself"),
        (Tiny, {"run": {"imports": ["no_such_module"]}}, "module 'no_such_module'"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused(
    digits: Path, tmp_path: Path, model: Any, tables: dict[str, Any], said: str
) -> None:
    table = {**config_of(str(digits), str(tmp_path)).model_dump(), "model": {}}
    for name, keys in tables.items():
        table[name].update(keys)
    config = setformer.load_config(**table)
    with pytest.raises(ConfigError, match=said), setformer.Training(config, model=model):
        pass
    assert not config.folder.exists()


class Followed(Tiny):
    """A momentum encoder of the last layer."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.slow = copy.deepcopy(self.head).requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.slow.weight.data.lerp_(self.head.weight.data, 0.1)
        features = self.body(images)
        return self.head(features) + self.slow(features)


def followed_net(pretrained: bool = False, num_classes: int = 10, **_: Any) -> nn.Module:
    return Followed(num_classes)


def test_a_model_of_imported_code_is_looked_at_as_one_that_is_passed(digits: Path, tmp_path: Path) -> None:
    timm.models.register_model(followed_net)
    table = {**config_of(str(digits), str(tmp_path)).model_dump(), "model": {"name": "followed_net"}}
    table["run"]["imports"] = [__name__]
    with (
        pytest.raises(ConfigError, match=r"model followed_net changes its parameter slow.weight in a forward pass"),
        setformer.Training(setformer.load_config(**table)),
    ):
        pass


@pytest.mark.parametrize("config", ["demo", Path("demo.toml"), {"run": {"name": "x"}}])
def test_what_makes_a_config_is_no_config(config: Any) -> None:
    for call in (setformer.train, setformer.open_data):
        with pytest.raises(ConfigError, match=r"config must be a run config, .*: make one with setformer.load_config"):
            call(config)


class Mine(Callback):
    """Does nothing."""


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (Mine, "must be a list"),
        (Mine(), "must be a list"),
        ([Mine], "class Mine, not an"),
        ([3], "has a int"),
    ],
)
def test_what_is_no_list_of_callbacks_is_refused(tmp_path: Path, callbacks: Any, said: str) -> None:
    config = setformer.load_config("demo", run={"out": str(tmp_path)})
    with pytest.raises(ConfigError, match=said):
        setformer.Training(config, callbacks=callbacks)


class Table(Classification):
    """Returns its sums as a table."""

    def sums(self, outputs: Any, batch: Any, targets: Any) -> Any:
        return {"top1": super().sums(outputs, batch, targets)[0]}


class Nameless(Classification):
    """Leaves a metric out."""

    def figures(self, sums: Any, count: float) -> dict[str, float]:
        return {"top1": 0.0}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Table, r"task mine: its method sums must return a tensor of shape \(k,\), and returned dict"),
        (Nameless, "task mine: its method figures must return 'top5', one of its metrics"),
    ],
)
def test_a_task_that_evaluates_to_something_else_is_named(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: type[Classification], said: str
) -> None:
    monkeypatch.setattr(task, "name", "mine")
    monkeypatch.setitem(build._TASKS, "mine", lambda args, classes: task({}, classes))
    table = {**config_of(str(digits), str(tmp_path)).model_dump(), "task": {"name": "mine"}}
    with (
        pytest.raises(ConfigError, match=said),
        setformer.Training(setformer.load_config(**table)) as run,
    ):
        run.evaluate()


def test_a_table_among_the_overrides_is_refused() -> None:
    wrong: Any = {"optim": {"lr": 1e-3}}
    with pytest.raises(ConfigError, match="and got dict: give tables as keywords"):
        setformer.load_config("demo", wrong)


def test_a_training_is_used_where_it_is_open_and_in_the_main_thread(digits: Path, tmp_path: Path) -> None:
    training = setformer.Training(config_of(str(digits), str(tmp_path)))
    with pytest.raises(LaunchError, match="this training is not open"):
        training.train()
    raised: list[Exception] = []

    def elsewhere() -> None:
        try:
            training.__enter__()
        except LaunchError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in str(raised[0])


def test_a_config_from_a_file_words_and_keywords(tmp_path: Path) -> None:
    config = setformer.load_config("demo", "optim.lr=1", "~ema.decay", optim={"lr": 2.0}, data={"root": tmp_path})
    assert (config.optim.lr, config.ema.decay, config.data.root) == (2.0, 0.0, str(tmp_path))
    assert config.model.name == "setformer_nano"
    tables = {"data": {"root": "x", "mean": (0, 0.5, 1)}, "batch": {"global_size": 8}, "schedule": {"steps": 3}}
    bare = setformer.load_config(run={"name": "bare"}, **tables)
    assert (bare.model.name, bare.data.mean) == ("setformer_tiny", (0, 0.5, 1))
    for words, keywords, said in (
        (("demo", "optim.lrr=1"), {}, "demo.toml: unknown key 'optim.lrr': did you mean optim.lr?"),
        ((), {"run": {"name": "x"}, "optimizer": {"lr": 1}, **tables}, "config: unknown table 'optimizer' with 'lr'"),
        (("no-such-config",), {}, "config file no-such-config does not exist"),
        (("demo",), {"data": {"root": "~/x"}}, "~ is not expanded here"),
        (("demo", "optim.lr"), {}, "is not of the form table.key=value"),
    ):
        with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
            setformer.load_config(*words, **keywords)


def test_streams_alone_are_those_of_the_run(digits: Path) -> None:
    config = setformer.load_config("demo", "batch.micro=16", data={"root": digits})
    data = setformer.open_data(config)
    together = {}
    for world in (1, 2):
        parts = []
        for rank in range(world):
            stream = setformer.train_stream(config, data, RankInfo(rank, world))
            batches = stream.micro_batches(3)
            parts.append([next(batches).sample_ids for _ in range(64 // 16 // world)])
            stream.close()
            data = setformer.open_data(config)  # a stream closes what it reads
        together[world] = torch.cat([part[at] for at in range(len(parts[0])) for part in parts])
    assert torch.equal(together[1], together[2])
    validation = setformer.eval_stream(config, data)
    counted = sum(float(batch.weights.sum()) for batch in validation.micro_batches())
    validation.close()
    assert counted == validation.num_samples == 360


def test_names_of_the_library_are_where_they_are_said_to_be() -> None:
    assert sorted(setformer.__all__) == sorted(setformer._HOME)
    for name in setformer.__all__:
        assert getattr(setformer, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = setformer.nosuch


def test_registering_needs_no_deepspeed() -> None:
    program = (
        "import sys; from setformer import register_augmentation, register_task; print('deepspeed' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True, cwd=ROOT).strip() == "False"
