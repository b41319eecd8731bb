"""What the launcher makes of a data table: containers, mixtures, engines, and models that must take every size."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dataloaders.config import DataConfig, MixtureEntry, ResolutionStage
from dataloaders.order.mixture import MixtureSource
from launch.run.inputs import ImageInputs, check_splits
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.model_config import ModelConfig


def test_a_mixture_is_opened_for_training_and_one_set_for_validation(digits: Path) -> None:
    entries = tuple(MixtureEntry(root=str(digits), train=name) for name in ("train", "val"))
    inputs = ImageInputs(DataConfig(root=str(digits), mixture=entries))
    train, val = inputs.open_train(), inputs.open(str(digits), "val")
    assert isinstance(train, MixtureSource)
    assert train.num_samples == 1437 + 360
    assert val.num_samples == 360
    check_splits(train, val)


def test_a_mixture_whose_set_is_missing_names_it(digits: Path) -> None:
    entries = (MixtureEntry(root=str(digits)), MixtureEntry(root=str(digits / "nowhere")))
    with pytest.raises(DataError, match="nowhere"):
        ImageInputs(DataConfig(mixture=entries)).open_train()


@pytest.mark.parametrize(
    "table",
    [{"image_size": 10**12}, {"resolutions": ({"step": 0, "image_size": 65_537},)}, {"bucket_multiple": 10**9}],
)
def test_sizes_that_no_tensor_could_hold_are_refused_in_the_config(table) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 65536"):
        DataConfig.model_validate({"root": "d", **table})


def test_models_take_every_size_that_training_shows() -> None:
    config = DataConfig(
        root="d",
        image_size=32,
        aspect_buckets=(0.6, 1.0, 1.6),
        bucket_multiple=8,
        resolutions=(ResolutionStage(step=0, image_size=24),),
    )
    model = ImageInputs(config).build_model(ModelConfig(name="setformer_nano"), 10, {}, 0)
    assert model.training
    assert model(torch.zeros(2, 3, 24, 40)).shape == (2, 10)


@pytest.mark.parametrize(
    "change", [{"aspect_buckets": (1.0, 1.6)}, {"resolutions": (ResolutionStage(step=9, image_size=96),)}]
)
def test_a_model_of_one_size_is_refused_before_the_step_that_changes_it(change: dict) -> None:
    inputs = ImageInputs(DataConfig(root="d", image_size=64, **change))
    model = ModelConfig(name="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"model vit_tiny_patch16_224 does not take images of .*choose other sizes"):
        inputs.build_model(model, 10, {}, 0)
