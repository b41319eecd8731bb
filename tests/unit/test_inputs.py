"""What the launcher makes of a data table: containers, mixtures, engines, and models that must take every size."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch._subclasses.fake_tensor import FakeTensor

from dataloaders.config import DataConfig, MixtureEntry, ResolutionStage
from dataloaders.order.mixture import MixtureSource
from launch.run.inputs import ImageInputs, check_shapes, check_splits
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


def test_many_and_large_sizes_are_checked_without_computing_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank computed an image of each of 127 sizes up to 4096 x 4096 before it began: minutes, and gigabytes."""
    real: list[tuple[int, ...]] = []
    model = ImageInputs(DataConfig(root="d", image_size=64)).build_model(ModelConfig(name="setformer_nano"), 10, {}, 0)
    forward = type(model).forward

    def watched(self: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        real.append((*images.shape[-2:], isinstance(images, FakeTensor)))
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", watched)
    stage = ResolutionStage(step=0, image_size=64, random_to=4096)
    check_shapes(model, "setformer_nano", DataConfig(root="d", image_size=64, resolutions=(stage,)))
    assert real == [(64, 64, True), (96, 96, True), (4096, 4096, True)]


class LooksAtNumbers(torch.nn.Module):
    """What runs only with numbers, and takes images of sides that 64 divides."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[-1] % 64:
            raise ValueError("a side that 64 does not divide")
        return images[images > -1].sum() + images.mean().item()


def test_a_model_that_looks_at_its_numbers_is_computed_and_a_ramp_of_wrong_steps_refused() -> None:
    def ramp(multiple: int) -> DataConfig:
        stage = ResolutionStage(step=0, image_size=64, ramp_to=256, multiple=multiple)
        return DataConfig(root="d", image_size=64, resolutions=(stage,))

    check_shapes(LooksAtNumbers(), "own", ramp(64))
    with pytest.raises(ConfigError, match=r"own does not take images of 96 x 96, .*a side that 64 does not divide"):
        check_shapes(LooksAtNumbers(), "own", ramp(32))


@pytest.mark.parametrize(
    "change", [{"aspect_buckets": (1.0, 1.6)}, {"resolutions": (ResolutionStage(step=9, image_size=96),)}]
)
def test_a_model_of_one_size_is_refused_before_the_step_that_changes_it(change: dict) -> None:
    inputs = ImageInputs(DataConfig(root="d", image_size=64, **change))
    model = ModelConfig(name="vit_tiny_patch16_224")
    with pytest.raises(ConfigError, match=r"model vit_tiny_patch16_224 does not take images of .*choose other sizes"):
        inputs.build_model(model, 10, {}, 0)


def test_an_image_size_that_the_patches_do_not_fill_is_refused_before_the_first_step() -> None:
    model = ModelConfig(name="vit_tiny_patch16_224", args={"dynamic_img_size": True})
    with pytest.raises(ConfigError, match=r"take images of 100 x 100, which data\.image_size asks for .*patch size"):
        ImageInputs(DataConfig(root="d", image_size=100)).build_model(model, 10, {}, 0)
    ImageInputs(DataConfig(root="d", image_size=100)).build_model(ModelConfig(name="setformer_nano"), 10, {}, 0)
