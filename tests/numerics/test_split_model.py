"""A SeTformer whose images lie on several ranks by rows computes what it computes on one."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401
from launch.plan.groups import exchange_of
from setformer_dist.core.errors import ConfigError
from setformer_dist.ops.parts import Rows
from setformer_dist.ops.set.attention import problem_of
from setformer_dist.ops.set.split import traffic
from setformer_dist.testing.threads import ThreadCollectives, ThreadParts, run_on_threads

IMAGE = (48, 24)
SHAPES = {
    "stem 2 1": {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "stem_strides": (2, 1)},
    "stem 2 2": {"embed_dim": 16, "depths": (2, 1), "num_heads": (2, 4), "stem_strides": (2, 2), "layer_scale": 0.5},
    "softmax": {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 2), "stem_strides": (2, 1), "attention": "softmax"},
    "stem 1 2": {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "stem_strides": (1, 2), "drop_path_rate": 0.4},
}


def model_of(shape: dict, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    attn = {"references": 4, **more.pop("attn", {})}
    model = timm.create_model("setformer_nano", num_classes=5, attn=attn, **{**shape, **more}).double()
    for parameter in model.parameters():  # zero biases would hide a border that is wrong
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=torch.float64)
    return model.train()


def whole(model: torch.nn.Module, images, labels):
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def in_parts(model: torch.nn.Module, images, labels, parts: int):
    """Return the logits of each part, the mean over parts of all gradients, and the groups."""

    def one(comm: ThreadCollectives):
        rows = Rows(ThreadParts(comm))
        mine = copy.deepcopy(model)
        mine.split_rows(rows)
        logits = mine(images[:, :, mine.image_rows(images.shape[2], rows.index, rows.count)])
        F.cross_entropy(logits, labels).backward()
        return logits.detach(), {name: p.grad for name, p in mine.named_parameters()}, rows

    found = run_on_threads(parts, one)
    mean = {name: sum(part[1][name] for part in found) / parts for name in found[0][1]}
    return [part[0] for part in found], mean, [part[2] for part in found]


def samples(count: int = 3):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, *IMAGE, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 5, (count,), generator=generator)


@pytest.mark.parametrize("recomputed", ["none", "cheap", "mlp", "block"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_one_rank(shape, recomputed):
    model = model_of(SHAPES[shape])
    model.set_recompute(recomputed)
    model.set_sample_keys(torch.tensor([3, 1, 8]))
    images, labels = samples()
    logits, gradients = whole(copy.deepcopy(model), images, labels)
    for parts in (1, 2, 3, 4):
        if images.shape[2] % model.row_multiple(parts):
            assert (parts, shape) == (4, "stem 2 2")
            continue
        found, mean, _ = in_parts(model, images, labels, parts)
        for part in found:
            assert torch.equal(part, found[0])  # all ranks have the same loss
            assert float((part - logits).abs().max()) < 1e-12
        for name, gradient in gradients.items():
            scale = max(1.0, float(gradient.abs().max()))
            assert float((mean[name] - gradient).abs().max()) / scale < 1e-12, name


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_exchanges_what_the_formula_says_and_a_recomputation_nothing(recomputed):
    model = model_of(SHAPES["stem 2 1"])
    model.set_grad_checkpointing(recomputed)
    config = model.config
    images, labels = samples(2)
    _, _, groups = in_parts(model, images, labels, 2)
    blocks = [
        (i, heads) for i, (d, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)) for _ in range(d)
    ]
    costs = [(heads, traffic(problem_of(config.attn), 2, 4, config.widths[i] // heads)) for i, heads in blocks]
    numbers = 2 * sum(heads * (cost.forward + cost.backward) for heads, cost in costs)
    pooled = 2 * 2 * config.widths[-1]  # forward and backward
    halo = 2 * (len(config.depths) - 1)
    for rows in groups:
        assert rows.messages == 2 * config.attn.iterations * len(blocks) + 2 + halo
        assert rows.bytes == 8 * (numbers + pooled)
        assert rows.shifted == 8 * 2 * 2 * IMAGE[1] // 2 * config.widths[0]
        assert_planned(model, rows, images=2)


def assert_planned(model, rows: Rows, images: int) -> None:
    """`setformer plan` counts the messages and bytes that a rank's model sent in fp64."""
    exchange = exchange_of(model, IMAGE, torch.float64)
    assert rows.messages == exchange.sums + exchange.rows + exchange.gathers
    assert rows.count * rows.gathered == images * exchange.gather_bytes
    assert rows.bytes == images * exchange.sum_bytes
    assert rows.shifted == images * exchange.row_bytes


def test_the_plan_knows_what_implicit_gradients_and_other_kernels_exchange():
    for more in (
        {"attention": "softmax"},
        {"attn": {"gradient": "implicit"}},
        {"attn": {"kernel": "nystrom", "anchors": 6, "reference_sets": 1}},
    ):
        model = model_of(SHAPES["stem 2 2"], **more)
        images, labels = samples(3)
        for rows in in_parts(model, images, labels, 2)[2]:
            assert_planned(model, rows, images=3)


def test_without_gradients_a_model_exchanges_the_forward_sums_alone():
    model = model_of(SHAPES["stem 2 1"]).eval()
    images, _ = samples(2)
    with torch.no_grad():
        expected = model(images)

        def one(comm: ThreadCollectives):
            rows, mine = Rows(ThreadParts(comm)), copy.deepcopy(model)
            mine.split_rows(rows)
            with torch.no_grad():
                return mine(images[:, :, mine.image_rows(IMAGE[0], rows.index, rows.count)]), rows.messages

        for logits, messages in run_on_threads(2, one):
            assert float((logits - expected).abs().max()) < 1e-12
            assert messages == model.config.attn.iterations * 3 + 1 + 1


def test_a_model_that_holds_whole_images_again_is_as_it_was():
    model = model_of(SHAPES["stem 2 1"])
    images, labels = samples(1)
    logits, _ = whole(copy.deepcopy(model), images, labels)
    run_on_threads(1, lambda comm: model.split_rows(Rows(ThreadParts(comm))))
    model.split_rows(None)
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"attention": "soft", "soft": {"landmarks": 4}}, "attention = 'soft' needs tokens of other rows"),
        ({"attention": "cast", "cast": {"clusters": 4}}, "attention = 'cast' needs tokens of other rows"),
        ({"drop_rate": 0.1}, "drop_rate = 0.1 draws from each rank's own generator"),
        ({"global_pool": "max"}, "global_pool = 'max' is not a sum over the parts"),
        ({"attn": {"tolerance": 1e-3, "gradient": "implicit"}}, "tolerance = 0.001 stops rounds"),
    ],
)
def test_a_model_without_a_split_form_is_refused_with_the_reason(choice, words):
    model = model_of(SHAPES["stem 2 1"], **choice)
    with pytest.raises(ConfigError, match=words):
        run_on_threads(1, lambda comm: model.split_rows(Rows(ThreadParts(comm))))


def test_rows_that_the_parts_do_not_divide_are_refused_with_sizes_that_work():
    model = model_of(SHAPES["stem 2 1"])
    with pytest.raises(ConfigError, match=r"image of 46 rows cannot be cut into 3 equal parts.*such as 36 or 48"):
        model.image_rows(46, 0, 3)
    with pytest.raises(ConfigError, match="such as 12"):
        model.image_rows(4, 0, 3)
