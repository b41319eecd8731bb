"""What a new run begins with besides its seed (`model.weights`): filled by name, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from launch.run.initial_weights import FirstWeights
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError, ConfigError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.store import Snapshot

SHAPES = {"body.w": (2, 3), "head.w": (5, 3), "head.b": (5,)}


def checkpoint(run: Path, scores: dict[str, float], *states: str, shapes: dict = SHAPES, model: object = None) -> Path:
    fragments = [
        Fragment(name, state, 0, shape, torch.full(shape, float(value)).reshape(-1))
        for value, state in enumerate(states, 1)
        for name, shape in shapes.items()
    ]
    trainer = {"run": {"evaluation": scores}, **({"config": {"model": model}} if model is not None else {})}
    return CheckpointManager(run / "checkpoints", Alone(), CheckpointConfig()).save(
        Snapshot(7, fragments, trainer, {}), Identity(model="m")
    )


def file_of(path: Path, shapes: dict = SHAPES, **buffers: torch.Tensor) -> Path:
    save_file(
        {**{name: torch.full(shape, 4.0, dtype=torch.bfloat16) for name, shape in shapes.items()}, **buffers}, path
    )
    return path


def fragments() -> dict[str, Fragment]:
    """Return what a rank holds: of one parameter only a part."""
    held = [
        Fragment("body.w", "param", 2, (2, 3), torch.zeros(3)),
        Fragment("body.w", "ema", 2, (2, 3), torch.zeros(3)),
        Fragment("body.w", "exp_avg", 2, (2, 3), torch.zeros(3)),
        Fragment("head.b", "param", 0, (5,), torch.zeros(5)),
    ]
    return {f"{f.name} {f.state}": f for f in held}


def filled(weights: Path, *skip: str) -> tuple[str, dict[str, float]]:
    """Return what is said, and the one value that each fragment then holds."""
    config = ModelConfig(weights=str(weights), skip=skip or None)
    held = fragments()
    report = FirstWeights(config, SHAPES, frozenset({"filter"}), Alone())(held.values())
    return report, {key: fragment.tensor.unique().item() for key, fragment in held.items()}


@pytest.mark.parametrize(
    ("scores", "value", "kind"),
    [
        ({}, 1, "the weights"),
        ({"top1": 0.5, "ema_top1": 0.6}, 2, "the averaged weights"),
        ({"top1": 0.6, "ema_top1": 0.5}, 1, "the weights"),
    ],
)
def test_weights_and_average_begin_with_what_scored_better(tmp_path, scores, value, kind):
    folder = checkpoint(tmp_path, scores, "param", "ema")
    for place in (tmp_path, tmp_path / "checkpoints", folder):
        report, held = filled(place)
        assert report == f"begins with {kind} of {folder}: 3 of 3 parameters"
        assert held == {"body.w param": value, "body.w ema": value, "body.w exp_avg": 0, "head.b param": value}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (
            {"stem_strides": [1, 2]},
            "trained as another function: model.args.stem_strides = [1, 2] there and [2, 2] here",
        ),
        ({"stem_strides": [2, 2], "attn": {"epsilon": 0.9}}, "model.args.attn.epsilon = 0.9 there and default here"),
        ({"stem_strides": [2, 2]}, ""),
        ([], ""),  # of no version of ours
    ],
)
def test_arguments_that_change_no_shape_are_told(tmp_path, args, said):
    config = ModelConfig(weights=str(tmp_path), args={"stem_strides": [2, 2]})
    theirs = ModelConfig(args=args).model_dump(mode="json") if isinstance(args, dict) else {"name": 3, "args": args}
    checkpoint(tmp_path, {}, "param", model=theirs)
    report = FirstWeights(config, SHAPES, frozenset(), Alone())(fragments().values())
    assert report.endswith(said or "3 of 3 parameters")


@pytest.mark.parametrize(("freeze", "told"), [(("head.",), True), (("body.",), False), ((), False)])
def test_what_is_drawn_and_never_trains_is_told(tmp_path, freeze, told):
    config = ModelConfig(weights=str(file_of(tmp_path / "model.safetensors")), skip=("head.",), freeze=freeze)
    report = FirstWeights(config, SHAPES, frozenset(), Alone())(fragments().values())
    assert ("model.freeze keeps 2 parameters of these as drawn, such as head.b" in report) == told


def test_a_file_serves_as_well_and_its_buffers_are_no_parameters(tmp_path):
    report, held = filled(file_of(tmp_path / "model.safetensors", filter=torch.ones(2)))
    assert report.endswith("model.safetensors: 3 of 3 parameters")
    assert held["body.w param"] == held["body.w ema"] == held["head.b param"] == 4
    assert filled(tmp_path) == (report, held)  # the folder that `setformer ckpt export` makes


def test_another_number_of_classes_is_refused_until_the_head_is_skipped(tmp_path):
    other = {**SHAPES, "head.w": (9, 3), "head.b": (9,)}
    file = file_of(tmp_path / "model.safetensors", other)
    with pytest.raises(
        CheckpointError, match=r"head.w is \(9, 3\) there and \(5, 3\) here; .*model.skip = \[\"head.\"\]"
    ):
        filled(file)
    report, held = filled(file, "head.")
    assert report.endswith("1 of 3 parameters; left as drawn from the seed: head.b, head.w")
    assert (held["body.w param"], held["head.b param"]) == (4, 0)
    assert filled(checkpoint(tmp_path, {}, "param", shapes=other), "head.")[1] == {
        **held,
        "body.w param": 1,
        "body.w ema": 1,
    }


CLASSIFIER = {"body.w": (2, 3), "head.norm.w": (3,), "head.fc.weight": (5, 3), "head.fc.bias": (5,)}


def begun(weights: Path, **config: object) -> tuple[str, dict[str, torch.Tensor]]:
    """Return what is said of weights for a SeTformer's classifier, and what each parameter then holds."""
    held = [Fragment(name, "param", 0, shape, torch.zeros(shape).reshape(-1)) for name, shape in CLASSIFIER.items()]
    first = FirstWeights(ModelConfig(weights=str(weights), **config), CLASSIFIER, frozenset(), Alone())
    report = first(held)
    assert first.check() == report
    return report, {fragment.name: fragment.tensor for fragment in held}


@pytest.mark.parametrize("change", [{"head.fc.weight": (9, 3), "head.fc.bias": (9,)}, None])
def test_a_run_with_other_classes_keeps_the_drawn_classifier_and_says_so(tmp_path, change):
    there = {**CLASSIFIER, **(change or {})}
    if change is None:  # a run whose model has no classifier
        there = {name: shape for name, shape in there.items() if "fc" not in name}
    checkpoint(tmp_path, {}, "param", shapes=there)
    report, held = begun(tmp_path)
    assert report.endswith("2 of 4 parameters; left as drawn from the seed: head.fc.bias, head.fc.weight")
    assert {name: tensor.unique().item() for name, tensor in held.items()} == {
        "body.w": 1, "head.norm.w": 1, "head.fc.weight": 0, "head.fc.bias": 0,
    }  # fmt: skip
    assert begun(tmp_path, skip=("head.fc.",))[1].keys() == held.keys()  # as configs of before said it


def test_a_run_with_as_many_classes_gives_its_classifier(tmp_path):
    checkpoint(tmp_path, {}, "param", shapes=CLASSIFIER)
    report, held = begun(tmp_path)
    assert report.endswith(": 4 of 4 parameters")
    assert all(tensor.unique().item() == 1 for tensor in held.values())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"head.norm.w": (4,)}, r"\(head.norm.w is \(4,\) there and \(3,\) here\): .*model.skip = \[\"head.norm.\"\]"),
        ({"head.fc.weight": (9, 4)}, r"head.fc.weight is \(9, 4\) there and \(5, 3\) here"),
        ({"neck": (1,)}, "neck is not in this model"),
    ],
)
def test_whatever_else_does_not_fit_is_refused_besides_other_classes(tmp_path, change, match):
    checkpoint(tmp_path, {}, "param", shapes={**CLASSIFIER, "head.fc.weight": (9, 3), "head.fc.bias": (9,), **change})
    with pytest.raises(CheckpointError, match=match):
        begun(tmp_path)


def test_missing_and_unknown_names_are_one_sentence(tmp_path):
    other = {"body.w": (2, 3), "neck": (1,)}
    with pytest.raises(
        CheckpointError,
        match=r"safetensors are of another model \(head.w is not in it; head.b is not in it; neck is not in",
    ):
        filled(file_of(tmp_path / "model.safetensors", other))
    assert filled(tmp_path / "model.safetensors", "head.", "neck")[1]["body.w param"] == 4


@pytest.mark.parametrize(
    ("skip", "match"), [("hed.", "no parameter's name begins with 'hed.'"), ("", "excludes every parameter")]
)
def test_what_to_skip_must_be_some_parameters_and_not_all(tmp_path, skip, match):
    with pytest.raises(ConfigError, match=match):
        filled(file_of(tmp_path / "model.safetensors"), skip)


def test_paths_that_hold_no_weights_of_ours(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        filled(tmp_path / "none")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        filled(tmp_path)
    torch.save({"body.w": torch.ones(2, 3)}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match="pickles can run code"):
        filled(tmp_path / "model.pt")
    file = file_of(tmp_path / "model.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"is not a complete \.safetensors file"):
        filled(file)


def test_a_damaged_checkpoint_is_not_begun_with(tmp_path):
    folder = checkpoint(tmp_path, {}, "param")
    path = next(folder.glob("rank-*"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        filled(tmp_path)


def test_ranks_that_find_different_files_all_refuse(tmp_path):
    class Two(Alone):
        def gather_json(self, value):
            return [value, [1, 2]]

    file = file_of(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="ranks found different weights"):
        FirstWeights(ModelConfig(weights=str(file)), SHAPES, frozenset(), Two())(fragments().values())
