"""Rectangular images: the same shape in training, evaluation, the model, and its input spec."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.config import AugmentConfig, DataConfig
from dataloaders.order.resolution import ImageSizes
from dataloaders.packing.pack import pack_image_folder
from dataloaders.pixels.transforms import decode_for_eval
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.sources.shards import open_split
from launch.run.inputs import ImageInputs
from setformer_dist.core.config import build
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.ranks import RankInfo

WIDE = {"root": "x", "image_size": 32, "image_width": 64}


def test_streams_and_pictures_have_the_shape(tmp_path: Path) -> None:
    for i in range(4):
        path = tmp_path / "images" / "ant" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60 + i, 3), dtype=np.uint8)).save(path)
    pack_image_folder(tmp_path / "images", tmp_path / "packed")
    source = open_split(tmp_path / "packed")
    config = build(DataConfig, {**WIDE, "augment": {"cutmix": 1.0}, "threads": 0}, "config")
    train = ShardTrainStream(source, config, 0, RankInfo(0, 1, 0, 1), 4, 4)
    assert next(train.micro_batches(0)).inputs.shape == (4, 3, 32, 64)
    evaluation = ShardEvalStream(source, config, RankInfo(0, 1, 0, 1), 4)
    assert next(iter(evaluation.micro_batches())).inputs.shape == (4, 3, 32, 64)
    source.close()


def test_an_image_of_the_shape_is_taken_as_it_is_and_others_keep_their_proportions() -> None:
    config = build(DataConfig, WIDE, "config")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    assert torch.equal(decode_for_eval(encoded(pixels), config), torch.from_numpy(pixels).permute(2, 0, 1))
    disc = np.zeros((400, 400, 3), np.uint8)
    y, x = np.mgrid[:400, :400]
    disc[(y - 200) ** 2 + (x - 200) ** 2 < 60**2] = 255
    seen = decode_for_eval(encoded(disc), config)[0] > 127
    assert seen.any(dim=1).sum() == pytest.approx(int(seen.any(dim=0).sum()), abs=1)  # as high as wide


def encoded(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_the_width_goes_along_with_the_height() -> None:
    table = {**WIDE, "resolutions": [{"step": 5, "image_size": 48}]}
    sizes = ImageSizes(build(DataConfig, table, "config"), 10)
    assert [sizes.shape(step) for step in (0, 4, 5)] == [(32, 64), (32, 64), (48, 96)]
    assert ImageSizes(DataConfig(root="x", image_size=32), 10).shape(0) == (32, 32)


@pytest.mark.parametrize("name", ["setformer_nano", "soft_tiny", "vit_tiny_patch16_224", "convnext_atto"])
def test_models_are_built_for_the_shape(name: str) -> None:
    inputs = ImageInputs(build(DataConfig, WIDE, "config"))
    model = inputs.build_model(ModelConfig(name=name), 5, {}, 0).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 64)).shape == (1, 5)


def test_the_spec_of_square_images_is_one_number() -> None:
    no_split: object = None
    assert ImageInputs(build(DataConfig, WIDE, "config")).spec(no_split) == {"image_size": [32, 64]}  # type: ignore[arg-type]
    assert ImageInputs(DataConfig(root="x", image_size=32)).spec(no_split) == {"image_size": 32}  # type: ignore[arg-type]
    assert ImageInputs(build(DataConfig, {**WIDE, "image_width": 32}, "config")).spec(no_split) == {"image_size": 32}  # type: ignore[arg-type]


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="image_width gives all images one shape, aspect_buckets several"):
        build(DataConfig, {**WIDE, "aspect_buckets": [1.0, 2.0]}, "config")
    with pytest.raises(ConfigError, match=r"pad = 8 must be smaller than image_size = 8"):
        build(DataConfig, {**WIDE, "image_width": 8, "augment": {"crop": "pad", "pad": 8}}, "config")
    assert AugmentConfig().crop == "resized"
