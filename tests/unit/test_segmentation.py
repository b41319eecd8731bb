"""Task "segmentation": its figures against plain counting, what counts, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import setformer_dist.models  # noqa: F401 - registers our models
from launch.run.initial_weights import FirstWeights
from setformer_dist.core.batch import VOID, Annotations, MicroBatch
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.task import Counted, Dense
from setformer_dist.engine.config import OptimConfig
from setformer_dist.engine.optim import parameter_groups
from setformer_dist.models.segmenter import Segmenter, levels_of
from setformer_dist.tasks.segmentation import Segmentation

CLASSES = ("road", "sky", "tree", "never")


def batch_of(masks: torch.Tensor | None, weights: tuple[float, ...] = (1.0, 1.0)) -> MicroBatch:
    count = len(weights)
    zeros = torch.zeros(count, dtype=torch.int64)
    annotations = None if masks is None else Annotations(masks)
    return MicroBatch(
        torch.zeros(count, 3, 8, 8), zeros, torch.tensor(weights), torch.arange(count), annotations=annotations
    )


@pytest.fixture
def masks() -> torch.Tensor:
    torch.manual_seed(1)
    masks = torch.randint(0, 3, (2, 12, 16), dtype=torch.uint8)
    masks[0, :3] = VOID
    return masks


def test_figures_are_those_of_plain_counting(masks):
    task, logits = Segmentation({}, CLASSES), torch.randn(2, 4, 12, 16)
    sums = task.sums(logits, batch_of(masks), task.targets(batch_of(masks)))
    figures = task.figures(sums.tolist(), 2)
    known, predicted = masks.numpy().ravel(), logits.argmax(1).numpy().ravel()
    counted = known != VOID
    known, predicted = known[counted], predicted[counted]
    iou = [
        np.sum((known == k) & (predicted == k)) / np.sum((known == k) | (predicted == k)) for k in range(len(CLASSES))
    ]
    recall = [np.mean(predicted[known == k] == k) for k in range(3)]
    assert figures["miou"] == pytest.approx(np.mean(iou))
    assert iou[3] == figures["iou_never"] == 0  # predicted, and never there
    assert figures["pixel_accuracy"] == pytest.approx(np.mean(known == predicted))
    assert figures["class_accuracy"] == pytest.approx(np.mean(recall))
    expected = torch.nn.functional.cross_entropy(logits, masks.long(), ignore_index=VOID)
    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_a_class_that_is_neither_there_nor_predicted_does_not_count(masks):
    task = Segmentation({}, CLASSES)
    logits = torch.nn.functional.one_hot(masks.clamp(max=2).long(), 4).permute(0, 3, 1, 2).float() * 9
    figures = task.figures(task.sums(logits, batch_of(masks), masks).tolist(), 2)
    assert figures["miou"] == figures["class_accuracy"] == 1
    assert "iou_never" not in figures


def test_figures_do_not_depend_on_how_a_split_is_cut(masks):
    task, logits = Segmentation({}, CLASSES), torch.randn(2, 4, 5, 7)
    whole = task.sums(logits, batch_of(masks), masks)
    parts = [task.sums(logits[i : i + 1], batch_of(masks[i : i + 1], (1.0,)), masks[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    first = task.sums(logits, batch_of(masks, (1.0, 0.0)), masks)  # the second is padding
    torch.testing.assert_close(first, parts[0])


def test_the_loss_over_the_count_is_a_mean_over_pixels(masks):
    weights = {"sky": 3.0}
    task, logits = Segmentation({"class_weights": weights, "auxiliary": 0.0}, CLASSES), torch.randn(2, 4, 12, 16)
    assert isinstance(task, Counted)
    assert isinstance(task, Dense)
    assert task.needs_parts == {"mask"}
    mean = task.loss(logits, masks) / task.count(batch_of(masks))
    of_class = torch.tensor([1.0, 3.0, 1.0, 1.0])
    expected = torch.nn.functional.cross_entropy(logits, masks.long(), of_class, ignore_index=VOID)
    torch.testing.assert_close(mean, expected)
    plain = Segmentation({}, CLASSES)
    assert plain.count(batch_of(masks)) == (masks != VOID).sum()
    both = plain.loss((logits, logits), masks)
    torch.testing.assert_close(both, 1.4 * plain.loss(logits, masks))


def test_masks_that_cannot_be_learnt_from_are_refused(masks):
    task = Segmentation({}, CLASSES)
    with pytest.raises(DataError, match="samples have none: pack them with --masks"):
        task.targets(batch_of(None))
    masks[1, 4, 4] = 9
    with pytest.raises(DataError, match="mask of sample 1 has class 9 in a pixel, and the data name 4 classes"):
        task.count(batch_of(masks))
    with pytest.raises(ConfigError, match="'car' is no output"):
        Segmentation({"class_weights": {"car": 2.0}}, CLASSES)
    with pytest.raises(ConfigError, match="masks have room for 255 classes"):
        Segmentation({}, tuple(map(str, range(256))))


def test_levels_are_the_last_of_each_size():
    assert levels_of([4, 8, 16, 32]) == [0, 1, 2, 3]
    assert levels_of([2, 4, 8, 16, 32]) == [1, 2, 3, 4]
    assert levels_of([4, 4, 8, 16, 16]) == [1, 2, 4]
    assert levels_of([16] * 12) == [2, 5, 8, 11]
    assert levels_of([16, 16]) == [0, 1]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("setformer_nano", {}, (40, 56)),
        ("setformer_mini", {"embed_dim": 32, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}, (75, 64)),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "embed_dim": 24, "depths": (1, 1, 1, 1)}, (64, 96)),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, (64, 96)),
        ("vit_tiny_patch16_224", {"img_size": (64, 96), "depth": 4}, (64, 96)),
    ],
)
def test_any_model_with_feature_maps_segments(name, arguments, size):
    encoder = timm.create_model(name, num_classes=0, **arguments)
    model = Segmenter(encoder, name, 5, 64, auxiliary=True)
    images = torch.randn(2, 3, *size)
    logits, auxiliary = model(images)
    stride = encoder.feature_info[model.levels[0]]["reduction"]
    assert logits.shape == (2, 5, -(-size[0] // stride), -(-size[1] // stride))
    assert auxiliary.shape[:2] == (2, 5)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None]
    assert all(n.startswith("encoder.") for n in idle), idle
    model.eval()
    with torch.no_grad():
        whole, alone = model(images), model(images[1:])
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-5)  # no image looks at another
    groups = parameter_groups(model, OptimConfig(layer_decay=0.7))
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.head.classify.weight)] == 1.0
    assert min(scales.values()) < 0.75


def test_the_size_is_that_of_the_published_model():
    with torch.device("meta"):  # 60 M parameters: Swin's table of UPerNet on ADE20K
        encoder = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
        model = Segmenter(encoder, "swin_tiny_patch4_window7_224", 150, 512, auxiliary=True)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(59.94e6, rel=1e-3)


def test_impossible_heads_are_refused():
    encoder = timm.create_model("setformer_nano", num_classes=0)
    with pytest.raises(ConfigError, match="channels = 100 must be a multiple of 64, such as 128"):
        Segmenter(encoder, "setformer_nano", 5, 100, auxiliary=True)
    with pytest.raises(ConfigError, match="task segmentation: plain gives no feature maps"):
        Segmenter(torch.nn.Linear(3, 3), "plain", 5, 64, auxiliary=True)


def test_heads_that_are_drawn_and_never_train_are_told(tmp_path):
    encoder = timm.create_model("setformer_nano", num_classes=3)
    safetensors.torch.save_file(encoder.state_dict(), tmp_path / "nano.safetensors")
    model = Segmenter(timm.create_model("setformer_nano", num_classes=0), "setformer_nano", 5, 64, auxiliary=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    config = ModelConfig(name="setformer_nano", weights=str(tmp_path / "nano.safetensors"), freeze=("head.",))
    said = FirstWeights(config, shapes, frozenset(), Alone()).check()
    count = sum(name.startswith("head.") for name in shapes)
    assert "its classifier is left out; drawn from the seed: head" in said
    assert f"model.freeze keeps {count} parameters of these as drawn, such as head.bottom.0.weight" in said
