"""parallel.sequence: the batch arithmetic of groups, and what is refused before training, each in one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from launch.run.config import load_run, resolve
from launch.run.inputs import inputs_of
from launch.run.sequence import check_sequence, decode_own_rows, with_rows
from setformer_dist.core.batch import MicroBatch
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.ranks import RankInfo
from setformer_dist.engine.batch_plan import solve
from setformer_dist.engine.config import BatchConfig, PrecisionConfig, ZeroConfig
from setformer_dist.engine.zero import deepspeed_config
from setformer_dist.ops.parts import Rows
from setformer_dist.tasks.build import build_task
from setformer_dist.testing.threads import ThreadParts, run_on_threads

DEMO = Path(__file__).parents[2] / "configs" / "runs" / "demo.toml"
LRA = Path(__file__).parents[2] / "configs" / "lra" / "text.toml"


def checked(*overrides: str, parts: int = 2, ranks: int = 2) -> nn.Module:
    """Return the model of a demo's run that passes the check."""
    config = load_run(DEMO, [f"parallel.sequence={parts}", *overrides])
    run = resolve(config, ranks)
    model = inputs_of(config.data).build_model(config.model, 10, {}, 0)
    check_sequence(run.config, build_task(config.task, tuple("abcdefghij")), model)
    return model


def test_the_global_batch_is_micro_times_accumulation_times_groups():
    plan = solve(BatchConfig(global_size=24, max_micro=4), 6, sequence=2)
    assert (plan.micro, plan.accumulation, plan.groups, plan.world_size, plan.sequence) == (4, 2, 3, 6, 2)
    json = deepspeed_config(PrecisionConfig(), ZeroConfig(), plan, 0.0, {})
    assert json["train_batch_size"] == 4 * 2 * 6  # DeepSpeed knows no groups and checks its own equation
    assert solve(BatchConfig(global_size=24), 6).sequence == 1


def test_neighbours_share_a_place_in_the_data():
    places = [RankInfo(rank, 6, rank % 3, 3).sharing_data(3) for rank in range(6)]
    assert [(place.rank, place.world_size) for place in places] == [(0, 2)] * 3 + [(1, 2)] * 3
    assert [place.local_rank for place in places] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("batch", "ranks", "parts", "words"),
    [
        (
            24,
            6,
            4,
            "6 ranks cannot be cut into groups of 4: use a multiple of 4 ranks, or parallel.sequence = 1, 2, 3 or",
        ),
        (24, 1, 2, "1 rank cannot be cut into groups of 2: use a multiple of 2 ranks, or parallel.sequence = 1"),
        (2, 6, 2, "fewer samples per step than the 3 groups of 2 ranks (parallel.sequence): use at most 4 ranks"),
        (
            8,
            6,
            2,
            "cannot be shared by 3 groups of 2 ranks (parallel.sequence): possible numbers of ranks are 2, 4, 8",
        ),
    ],
)
def test_ranks_that_cannot_be_grouped(batch, ranks, parts, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        solve(BatchConfig(global_size=batch), ranks, sequence=parts)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.image_size=24"], "image of 24 rows cannot be cut into 2 equal parts.*multiple of 16, such as 16 or 32"),
        (
            ["data.resolutions=[{epoch = 2, image_size = 40}]", "~data.augment.crop", "~data.augment.pad"],
            "image of 40 rows.*such as 32 or 48",
        ),
        (["model.args.attention=soft"], "parallel.sequence = 2: attention = 'soft' needs tokens of other rows"),
        (["model.args.attention=cast"], "parallel.sequence = 2: attention = 'cast' needs tokens of other rows"),
        (["model.args.attention=softmax", "model.args.global_pool=max"], "global_pool = 'max' is not a sum"),
        (["model.args.drop_rate=0.1"], "dropout of 0.1 from each rank's own generator"),
        (["model.args.global_pool=max"], "global_pool = 'max' is not a sum"),
        (["model.args.attn.tolerance=1e-3", "model.args.attn.gradient=implicit"], "set attn.tolerance = 0"),
        (
            ["model.name=vit_tiny_patch16_224", "~model.args", "model.args.depth=1", "model.drop_path=0"],
            "vit_tiny_patch16_224 has no form for images cut by rows; a SeTformer",
        ),
        (
            [
                "model.name=swin_tiny_patch4_window7_224",
                "~model.args",
                "model.args.depths=[1, 1, 1, 1]",
                "model.drop_path=0",
            ],
            "swin_tiny_patch4_window7_224 has no form",
        ),
        (["model.name=soft_tiny", "~model.args", "data.image_size=32"], "soft_tiny has no form"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_groups_cannot_share_is_refused_with_the_reason(overrides, words):
    with pytest.raises(ConfigError, match=words):
        checked(*overrides)


def test_whole_images_are_not_asked_anything():
    checked("model.args.attention=soft", parts=1)
    checked("data.image_size=24", parts=1)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.BatchNorm2d(3, track_running_stats=False), "0 of .* is a BatchNorm, whose statistics would be"),
        (nn.Dropout(0.2), "0 of .* is a dropout of 0.2 from each rank's own generator"),
    ],
    ids=["batch norm", "dropout"],
)
def test_layers_of_an_own_model_that_mix_rows_or_draw_are_refused(layer, words):
    run = resolve(load_run(DEMO, ["parallel.sequence=2"]), 2)
    with pytest.raises(ConfigError, match=words):
        check_sequence(run.config, None, nn.Sequential(layer, nn.Linear(3, 3)))


def test_what_a_page_alone_shows_is_refused_when_it_is_read():
    with pytest.raises(ConfigError, match=r"parallel.sequence = 2 cuts images by rows, and \[data\] has token"):
        load_run(LRA, ["parallel.sequence=2"])
    with pytest.raises(ConfigError, match=r"eval.marginal_error looks at plans of whole images"):
        load_run(DEMO, ["parallel.sequence=2", "eval.marginal_error=true"])
    with pytest.raises(ConfigError, match=r"parallel.sequence = 0"):
        load_run(DEMO, ["parallel.sequence=0"])


def test_a_rank_keeps_the_rows_that_its_part_needs_of_images_prepared_whole():
    model = checked("data.image_size=32")  # stem strides 1 and 2: two rows above, one below
    images = torch.arange(32.0).view(1, 1, 32, 1)
    batch = MicroBatch(images, *(torch.zeros(1) for _ in range(3)))

    def one(comm):
        prepare = with_rows(lambda batch, train: (batch.inputs, "targets"), model, Rows(ThreadParts(comm)))
        return prepare(batch, train=True)

    (top, targets), (bottom, _) = run_on_threads(2, one)
    assert targets == "targets"
    assert top.flatten().tolist() == list(range(17))
    assert bottom.flatten().tolist() == list(range(14, 32))


class Tiles:
    """Notes which rows are to be decoded."""

    rows: object = None

    def decode_only(self, rows: object) -> None:
        self.rows = rows


@pytest.mark.parametrize("further", ["color_jitter=0.1", "randaugment_ops=1", "policy=3augment", "vflip=0.1", None])
def test_windows_are_decoded_whole_where_other_rows_are_looked_at(further: str | None) -> None:
    words = ["data.augment.crop=window", "parallel.sequence=2", *([f"data.augment.{further}"] if further else [])]
    config, split = load_run(DEMO, words), Tiles()
    decode_own_rows(config, split, checked(*words), RankInfo(1, 2))  # type: ignore[arg-type]
    assert (split.rows is None) == (further is not None)
