"""Programs of users, for test_library.py: `python -m tests.integration.library_runs NAME DATA OUT`."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import setformer
from launch.run.config import RunConfig
from launch.testing.commands import SHORT
from setformer_dist.core.errors import SetformerError
from setformer_dist.tasks.classification import Classification

LENGTH = ("~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=7", "run.record_samples=true",
          "checkpoint.every_steps=4", "eval.every_steps=6", "batch.global_size=16")  # fmt: skip


def config_of(data: str, out: str, **tables: Any) -> RunConfig:
    return setformer.load_config("demo", *SHORT, *LENGTH, data={"root": Path(data)}, run={"out": out}, **tables)


def in_pieces(data: str, out: str) -> None:
    """Train in pieces, over two openings, looked at in between."""
    threads = torch.get_num_threads()
    config = config_of(data, out)
    with setformer.Training(config) as run:
        assert (run.step, run.total_steps) == (0, 7)
        outcome = run.train(steps=3)
        assert (outcome.signum, run.step) == (0, 3)
        first = run.evaluate()
        assert first == run.evaluate()
        assert {"loss", "top1", "ema_top1"} <= set(first)
        run.save()
        run.save()
        assert (run.folder / "checkpoints" / "step-00000003" / "manifest.json").exists()
        run.train(steps=2)
    assert torch.get_num_threads() == threads
    assert json.loads((config.folder / "summary.json").read_text())["finished"] is False
    with setformer.Training(config) as run:
        assert run.step == 5  # saved on leaving
        assert run.train().signum is None
        trained = setformer.load(run.folder)
        figures = setformer.evaluate(trained, batch=64).figures  # within a training, whose group stays
        assert abs(figures["loss"] - run.evaluate()["ema_loss" if trained.weights == "ema" else "loss"]) < 1e-5
    print("pieces", outcome.state.step)


class Tiny(nn.Module):
    """What every rank and every load makes alike."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.Flatten(), nn.LayerNorm(24 * 16))
        self.head = nn.Linear(24 * 16, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(images))


def noisy(image: torch.Tensor, key: int) -> torch.Tensor:
    noise = torch.randint(0, 40, image.shape, generator=torch.Generator().manual_seed(key), dtype=torch.uint8)
    return image // 2 + noise


def own_model(data: str, out: str) -> None:
    """Train a module and an augmentation that are nowhere but here; on as many ranks as there are."""
    setformer.register_augmentation("noisy", noisy)
    table = {**config_of(data, out).model_dump(), "model": {}}
    table["data"]["augment"]["own"] = ["noisy"]
    config = RunConfig.model_validate(table)
    torch.manual_seed(7)  # a module begins with the weights that it has
    template = Tiny(10)
    before = template.head.weight.clone()
    with setformer.Training(config, model=template) as run:
        run.train(steps=4)
    with contextlib.suppress(ZeroDivisionError), setformer.Training(config, model=template) as run:
        run.train(steps=1)
        _ = 1 / 0  # an error of the user's: nothing more is saved, the folder is let go
    with setformer.Training(config, model=template) as run:
        assert run.step == 4
        run.train()
    assert torch.equal(template.head.weight, before)
    trained = setformer.load(config.folder, model=template)
    assert not torch.equal(trained.model.head.weight, before)
    assert torch.equal(template.head.weight, before)
    try:
        setformer.load(config.folder)
    except SetformerError as error:
        print(error)
    try:
        setformer.load(config.folder, model=nn.Linear(3, 4))
    except SetformerError as error:
        print(error)


class Odd(nn.Module):
    """Parameters of all kinds, some of which do not train, and a buffer that is drawn."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 4, 4).to(memory_format=torch.channels_last), nn.Flatten())
        self.fixed = nn.Linear(8 * 16, 16).requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.level = nn.Parameter(torch.rand(()), requires_grad=False)
        self.wide = nn.Parameter(torch.ones(16, dtype=torch.float64))
        self.turned = nn.Parameter(torch.randn(16, 16).t() / 4)
        self.one = nn.Parameter(torch.zeros(1).expand(16))
        self.register_buffer("frequencies", torch.randn(16))
        self.head = nn.Linear(16, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.fixed(self.body(images)) * (self.gain + self.level) * self.wide.to(images.dtype)
        return self.head(torch.cos(x * self.frequencies) @ self.turned + self.one)


def odd_model(data: str, out: str, stage: int) -> None:
    """Train such a model, resume and load it by one with other weights, and by one with other buffers."""
    table = {**config_of(data, out).model_dump(), "model": {}}
    table["zero"]["stage"] = stage
    config = RunConfig.model_validate(table)
    torch.manual_seed(7)
    template = Odd(10)
    torch.manual_seed(8)
    other = Odd(10)
    with setformer.Training(config, model=template) as run:
        run.train(steps=4)
    try:
        setformer.train(config, model=other)
    except SetformerError as error:
        print(error)
    other.frequencies.copy_(template.frequencies)
    setformer.train(config, model=other)  # resumed: its own weights count for nothing
    trained = setformer.load(config.folder, model=other).model
    assert torch.equal(trained.fixed.weight, template.fixed.weight)
    assert torch.equal(trained.level, template.level)
    assert not torch.equal(trained.fixed.weight, other.fixed.weight)
    for name in ("turned", "wide", "one", "gain"):
        assert not torch.equal(getattr(trained, name), getattr(template, name).float()), name
    other.frequencies.add_(1)
    try:
        setformer.load(config.folder, model=other)
    except SetformerError as error:
        print(error)


class Changing(Tiny):
    """What trains changes during the run."""

    passes = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += self.training
        self.body.requires_grad_(self.passes < 4)
        return super().forward(images)


class Blind(Tiny):
    """Learns nothing: its outputs have no gradients."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images).detach()


class Waves(Tiny):
    """Large numbers in a buffer; dropout."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.register_buffer("frequencies", 1000 * torch.rand(24 * 16))
        self.drop = nn.Dropout(0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.body(images) * torch.cos(self.frequencies)))


class Vector(Classification):
    """One loss for each sample."""

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Named(nn.Module):
    """Returns a table."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.inner = Tiny(outputs)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.inner(images)}


class OfTables(Classification):
    """Takes it."""

    def loss(self, outputs: Any, targets: torch.Tensor) -> torch.Tensor:
        return super().loss(outputs["logits"], targets)

    def sums(self, outputs: Any, batch: Any, targets: torch.Tensor) -> torch.Tensor:
        return super().sums(outputs["logits"], batch, targets)


def unusual(data: str, out: str) -> None:
    """Train what cannot be trained, models whose modes and outputs are unusual, and a large buffer in bf16."""
    setformer.register_task("vector", Vector)
    setformer.register_task("tables", OfTables)

    def config(name: str, task: str = "classification", dtype: str = "fp32") -> RunConfig:
        table = {**config_of(data, out).model_dump(), "model": {}, "ema": {}, "task": {"name": task}}
        table["run"]["name"], table["precision"]["dtype"] = name, dtype
        return RunConfig.model_validate(table)

    for name, model, task in (
        ("changing", Changing, "classification"),
        ("blind", Blind, "classification"),
        ("vector", Tiny, "vector"),
    ):
        try:
            setformer.train(config(name, task), model=model)
        except SetformerError as error:
            print(error)
    setformer.train(config("tables", "tables"), model=Named)
    with setformer.Training(config("waves", dtype="bf16"), model=Waves) as run:
        run.train(steps=2)
        run.model.eval()
        run.train(steps=2)
        assert run.model.training
        figures = run.evaluate()
    loaded = setformer.evaluate(setformer.load(run.folder, model=Waves)).figures
    assert abs(loaded["loss"] - figures["loss"]) < 5e-3, (loaded, figures)


class Bars:
    """Sample i: a bar at the place of its class; a neighbouring class is a little probable."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, dict[str, float]]:
        noise = torch.Generator().manual_seed(self.seed * self.count + index)
        image, label = torch.randint(0, 60, (16, 16, 3), generator=noise, dtype=torch.uint8), index % 4
        image[:, 4 * label : 4 * label + 4] += 150
        return image, label, {f"bar {label}": 0.9, f"bar {(label + 1) % 4}": 0.1}


def own_data(_: str, out: str) -> None:
    """Train on data sets in Python with soft labels, in two openings; other data are refused."""
    config = config_of("bars", out)
    classes = [f"bar {number}" for number in range(4)]
    data = setformer.own_data(Bars(160), Bars(32, seed=1), classes)
    with setformer.Training(config, data=data) as run:
        run.train(steps=4)
    with setformer.Training(config, data=setformer.own_data(Bars(160), Bars(32, seed=1), classes)) as run:
        assert run.step == 4
        outcome = run.train()
    # Soft labels cannot be met below the entropy of their distribution, which one-hot labels would let the loss do.
    assert outcome.state.evaluation["loss"] > 0.325
    try:
        setformer.train(config, data=setformer.own_data(Bars(160, seed=2), Bars(32, seed=1), classes))
    except SetformerError as error:
        print(error)


PROGRAMS: dict[str, Callable[[str, str], None]] = {
    "in_pieces": in_pieces,
    "own_model": own_model,
    "own_data": own_data,
    "unusual": unusual,
    **{f"odd_model_{stage}": functools.partial(odd_model, stage=stage) for stage in (0, 2, 3)},
}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](sys.argv[2], sys.argv[3])
