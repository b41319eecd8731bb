"""The sequence encoder: any attention, masks from padding, dropout that knows the sample alone."""

from typing import Any

import pytest
import timm
import torch
from torch.nn import functional as F

import setformer_dist.models  # noqa: F401 — registers lra_encoder
from setformer_dist.core.errors import ConfigError
from setformer_dist.models.sequence import SequenceEncoder, keyed_dropout

KINDS = ("set", "soft", "soft_norm", "cast", "softmax")


def encoder(kind: str = "softmax", **fields: Any) -> SequenceEncoder:
    torch.manual_seed(0)
    cast = {"clusters": 4, "size": 0}
    attention = {"kind": kind, "attn": {"references": 8}, "soft": {"landmarks": 8}, "cast": cast}
    model = timm.create_model("lra_encoder", **{"vocabulary": 20, "length": 24, "attention": attention, **fields})
    assert isinstance(model, SequenceEncoder)
    return model


def ids(*shape: int, valid: int = 24) -> torch.Tensor:
    drawn = torch.randint(1, 20, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    drawn[..., valid:] = 0
    return drawn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequences", [1, 2])
def test_every_parameter_gets_a_gradient(kind: str, sequences: int) -> None:
    model = encoder(kind, sequences=sequences, num_classes=3)
    shape = (5, 24) if sequences == 1 else (5, 2, 24)
    logits = model(ids(*shape, valid=17))
    assert logits.shape == (5, 3)
    F.cross_entropy(logits, torch.arange(5) % 3).backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name


@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_are_seen_and_positions_matter(kind: str) -> None:
    model = encoder(kind, length=24).eval()
    x = ids(2, 24)
    other = x.clone()
    other[:, 11] = other[:, 11] % 19 + 1
    swapped = x.clone()
    swapped[:, 3], swapped[:, 4] = other[:, 11], x[:, 3]
    assert not torch.allclose(model(x), model(other), atol=1e-7)
    assert not torch.allclose(model(x), model(swapped), atol=1e-7)


@pytest.mark.parametrize("kind", ["set", "softmax", "soft", "soft_norm"])
def test_padding_does_not_change_the_result(kind: str) -> None:
    """The same sequences in a longer frame: positions of valid tokens stay, the rest is masked."""
    long, short = encoder(kind, length=24).eval(), encoder(kind, length=24).eval()
    short = encoder(kind, length=16).eval()
    state = long.state_dict()
    state["embedding.position"] = state["embedding.position"][:16].clone()
    short.load_state_dict(state)
    x = ids(3, 24, valid=16)
    torch.testing.assert_close(long(x), short(x[:, :16].contiguous()), atol=2e-6, rtol=1e-5)


def test_a_full_task_needs_no_mask() -> None:
    x = ids(3, 24)
    masked, plain = encoder("set").eval(), encoder("set", padded=False).eval()
    torch.testing.assert_close(masked(x), plain(x), atol=2e-6, rtol=1e-5)


def test_the_mean_is_over_valid_tokens() -> None:
    model = encoder().eval()
    x = ids(2, 24, valid=5)
    tokens: list[torch.Tensor] = []
    model.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
    pooled = model.forward_features(x)
    torch.testing.assert_close(pooled, tokens[0][:, :5].mean(1))


def test_two_sequences_are_compared() -> None:
    model = encoder("softmax", sequences=2, num_classes=4).eval()
    pair = ids(3, 2, 24, valid=20)
    a, b = model.forward_features(pair[:, 0]), model.forward_features(pair[:, 1])
    torch.testing.assert_close(model(pair), model.head(torch.cat([a, b, a * b, a - b], 1)))


# Dropout.


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(rate: float) -> None:
    keys = torch.arange(64) * 10**12 - 7
    dropped = keyed_dropout(torch.ones(64, 50, 40), keys, 3, rate)
    zero = (dropped == 0).float()
    n = zero.numel()
    assert zero.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / n) ** 0.5)
    assert dropped[dropped > 0].unique().tolist() == pytest.approx([1 / (1 - rate)])
    # No sample, place or channel is favoured, and neighbours are independent.
    for axes, size in (((1, 2), 2000), ((0, 2), 2560), ((0, 1), 3200)):
        assert (zero.mean(axes) - rate).abs().max().item() < 5 * (rate * (1 - rate) / size) ** 0.5
    both = (zero[:, 1:] * zero[:, :-1]).mean().item()
    assert both == pytest.approx(rate**2, abs=5 * (rate**2 * (1 - rate**2) / n) ** 0.5)


def test_dropout_is_a_function_of_key_and_place_alone() -> None:
    x = torch.ones(6, 5, 8)
    keys = torch.tensor([5, 5 + 2**40, -3, 0, 2**62, 17])
    whole = keyed_dropout(x, keys, 2, 0.5)
    assert torch.equal(whole[3:5], keyed_dropout(x[3:5], keys[3:5], 2, 0.5))
    assert len({row.numpy().tobytes() for row in whole}) == 6
    assert not torch.equal(whole, keyed_dropout(x, keys, 3, 0.5))
    torch.manual_seed(4)
    assert torch.equal(whole, keyed_dropout(x, keys, 2, 0.5))


@pytest.mark.parametrize("sequences", [1, 2])
def test_a_sample_trains_alike_in_any_micro_batch(sequences: int) -> None:
    model = encoder("set", sequences=sequences, dropout=0.3, drop_path_rate=0.4)
    x = ids(*((6, 24) if sequences == 1 else (6, 2, 24)), valid=19)
    keys = torch.arange(6) * 999_999_999_999
    model.set_sample_keys(keys)
    whole = model(x)
    model.set_sample_keys(keys[2:4])
    torch.testing.assert_close(model(x[2:4]), whole[2:4], atol=1e-6, rtol=1e-5)
    model.set_sample_keys(keys + 1)
    assert not torch.allclose(model(x), whole, atol=1e-3)
    assert torch.equal(model.eval()(x), model(x))


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = encoder("set", dropout=0.2)
        model.set_grad_checkpointing(recompute)
        model.set_sample_keys(torch.arange(4))
        model(ids(4, 24, valid=20)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# Choices.


def test_only_matrices_decay() -> None:
    model = encoder("set")
    decaying = {name for name, _ in model.named_parameters()} - model.no_weight_decay()
    assert decaying == {
        f"{prefix}.weight"
        for prefix in ("head.0", "head.2", *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("attn.input", "attn.output")),
                       *(f"blocks.{i}.{n}" for i in (0, 1) for n in ("fc1", "fc2")))
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"attention": {"kind": "set", "attn": {"references": 9, "position_filter": "separable"}}},
            "needs the grid of an image",
        ),
        ({"attention": {"kind": "soft", "soft": {"sampling": "conv"}}}, "needs the grid of an image"),
        ({"attention": {"kind": "softmaxx"}}, "softmaxx"),
        ({"num_heads": 5}, "do not divide dim = 64"),
        ({"lenght": 3}, "did you mean length"),
        ({"vocabulary": 1}, "vocabulary"),
    ],
)
def test_impossible_choices(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encoder(**fields)


def test_ids_of_another_shape_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"\(b, 24\)"):
        encoder()(ids(2, 23))
    with pytest.raises(ConfigError, match="pretrained"):
        timm.create_model("lra_encoder", pretrained=True, vocabulary=9, length=9)
