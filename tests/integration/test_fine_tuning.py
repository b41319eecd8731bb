"""Fine-tuning weights in timm's layout: local files, a hub's cache, pickles that must be converted first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import timm
import torch
from timm.models import register_model
from torch import nn

from checkpoints.config import CheckpointConfig
from checkpoints.identity import Identity
from checkpoints.manager import CheckpointManager
from launch.run.initial_weights import FirstWeights
from launch.run.timm_weights import adapted
from launch.testing.commands import setformer, train_words
from setformer_dist.core.comm import Alone
from setformer_dist.core.errors import CheckpointError
from setformer_dist.core.fragments import Fragment
from setformer_dist.core.model_config import ModelConfig
from setformer_dist.core.store import Snapshot
from setformer_dist.models.build import build_model, timm_arguments

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as timm's hub has it: 224 pixels, 1000 classes."""
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("hub") / "model.safetensors"
    model = timm.create_model(NAME, num_classes=1000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # as if trained: no bias is still zero
    safetensors.torch.save_file(model.state_dict(), path)
    return path


def fill(config: ModelConfig, classes: int, size: int | tuple[int, int]) -> tuple[str, dict[str, torch.Tensor]]:
    model = build_model(config, classes, size, seed=1)
    fragments = [Fragment(n, "param", 0, tuple(p.shape), p.detach().reshape(-1)) for n, p in model.named_parameters()]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    first = FirstWeights(config, shapes, frozenset(), Alone(), timm_arguments(config, classes, size))
    return first(fragments), dict(model.named_parameters())


def test_another_size_and_other_classes_by_timms_rules(pretrained: Path) -> None:
    report, ours = fill(ModelConfig(name=NAME, weights=str(pretrained)), 10, 64)
    overlay = {"state_dict": safetensors.torch.load_file(pretrained)}
    theirs = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10, img_size=64)
    fresh = build_model(ModelConfig(name=NAME), 10, 64, seed=1).state_dict()
    assert "150 of 152 parameters" in report
    assert "pos_embed (1, 197, 192) → (1, 17, 192)" in report
    assert "left as drawn from the seed: head.bias, head.weight" in report
    for name, parameter in theirs.named_parameters():
        expected = fresh[name] if name.startswith("head.") else parameter
        assert torch.equal(ours[name], expected), name


def test_the_same_classes_keep_their_head(pretrained: Path) -> None:
    report, ours = fill(ModelConfig(name=NAME, weights=str(pretrained)), 1000, 64)
    assert "152 of 152 parameters" in report
    assert torch.equal(ours["head.weight"], safetensors.torch.load_file(pretrained)["head.weight"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda t: (t * 100).to(torch.int32),
            "have numbers of type I32 in blocks.0.attn.qkv.bias, as quantized weights",
        ),
        (lambda t: t * torch.nan, "hold values in blocks.0.attn.qkv.bias that are not finite"),
    ],
)
def test_weights_that_are_no_trained_numbers_are_refused(
    pretrained: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    tensors = safetensors.torch.load_file(pretrained)
    tensors["blocks.0.attn.qkv.bias"] = change(tensors["blocks.0.attn.qkv.bias"])
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    for size in (64, 224):  # adapted, and as it is
        with pytest.raises(CheckpointError, match=said):
            fill(ModelConfig(name=NAME, weights=str(path)), 10, size)


def test_another_architecture_is_refused_and_keeps_what_the_user_skips(pretrained: Path) -> None:
    config = ModelConfig(name="vit_small_patch16_224", weights=str(pretrained), skip=("head.",))
    with pytest.raises(CheckpointError, match="of another model"):
        fill(config, 10, 64)
    table = safetensors.torch.load_file(pretrained)
    lacking = pretrained.with_name("lacking.safetensors")
    safetensors.torch.save_file({n: t for n, t in table.items() if not n.startswith("norm.")}, lacking)
    with pytest.raises(CheckpointError, match=r'model.skip = \["head.", "norm."\]'):
        fill(ModelConfig(name=NAME, weights=str(lacking), skip=("head.",)), 10, 64)
    with pytest.raises(CheckpointError, match=r'model.skip = \["norm."\]'):
        fill(ModelConfig(name=NAME, weights=str(lacking)), 10, 64)


def test_windows_of_swin_are_resized_without_a_word_of_timms(recwarn: pytest.WarningsRecorder) -> None:
    name = "swin_tiny_patch4_window7_224"
    small = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1], "patch_size": 2, "num_classes": 10}
    tensors = {n: p.detach() for n, p in timm.create_model(name, **small, img_size=16).named_parameters()}
    table = "layers.1.blocks.0.attn.relative_position_bias_table"
    found = adapted(tensors, name, {**small, "img_size": 32})
    assert (tensors[table].shape, found.tensors[table].shape) == ((49, 1), (169, 1))
    assert found.drawn == frozenset()
    assert not [w for w in recwarn if "timm" in w.filename]


def test_what_is_skipped_is_not_said_to_be_resized(tmp_path: Path) -> None:
    args = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 1], "patch_size": 2}
    config = ModelConfig(name="swin_tiny_patch4_window7_224", args=args)
    weights = tmp_path / "swin.safetensors"
    safetensors.torch.save_file(dict(build_model(config, 10, 16, seed=2).named_parameters()), weights)
    tables = [f"layers.1.blocks.{block}.attn.relative_position_bias_table" for block in (0, 1)]
    report, _ = fill(config.model_copy(update={"weights": str(weights), "skip": (tables[0],)}), 10, 32)
    assert (
        f"resized by timm's rules: {tables[1]} (49, 1) → (169, 1); left as drawn from the seed: {tables[0]}" in report
    )


def test_names_that_only_the_file_has_are_reported(pretrained: Path, tmp_path: Path) -> None:
    table = {**safetensors.torch.load_file(pretrained), "extra.weight": torch.ones(2)}
    safetensors.torch.save_file(table, tmp_path / "more.safetensors")
    report, _ = fill(ModelConfig(name=NAME, weights=str(tmp_path / "more.safetensors")), 10, 64)
    assert "1 tensors have no place in the model: extra.weight" in report
    tensors = safetensors.torch.load_file(pretrained)
    assert adapted(tensors, NAME, {"num_classes": 10, "img_size": 64}).unused == ()


def test_a_runs_checkpoint_is_resized_as_its_export_is(pretrained: Path, tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(pretrained)
    held = [Fragment(n, "param", 0, tuple(t.shape), t.reshape(-1)) for n, t in tensors.items()]
    state = Snapshot(7, held, {"run": {"evaluation": {}}}, {})
    step = CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(state, Identity(model=NAME))
    for classes in (10, 1000):
        said, ours = fill(ModelConfig(name=NAME, weights=str(step)), classes, 64)
        same, theirs = fill(ModelConfig(name=NAME, weights=str(pretrained)), classes, 64)
        assert said.partition(":")[2] == same.partition(":")[2]
        assert "pos_embed (1, 197, 192) → (1, 17, 192)" in said
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("theirs", "ours", "fits"),
    [
        ((32, 32), (64, 32), True),
        ((16, 64), (16, 64), True),
        ((16, 64), (32, 32), False),  # as many positions
        ((32, 32), (16, 64), False),
        ((16, 64), (64, 64), False),  # 4 x 16 would be taken for 8 x 8
    ],
)
@pytest.mark.parametrize("exported", [False, True])
def test_rows_of_positions_are_never_taken_for_others(
    theirs: tuple[int, int], ours: tuple[int, int], fits: bool, exported: bool, tmp_path: Path
) -> None:
    args = {"embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4}
    model = build_model(ModelConfig(name=NAME, args=args), 10, theirs, seed=2)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if exported:
        place = tmp_path / "model.safetensors"
        safetensors.torch.save_file(tensors, place)
        about = {"pretrained_cfg": {"input_size": [3, *theirs]}}
        (tmp_path / "config.json").write_text(json.dumps(about))
    else:
        held = [Fragment(n, "param", 0, tuple(t.shape), t.reshape(-1)) for n, t in tensors.items()]
        trainer = {"run": {"evaluation": {}}, "inputs": {"image_size": list(theirs)}}
        place = CheckpointManager(tmp_path, Alone(), CheckpointConfig()).save(
            Snapshot(7, held, trainer, {}), Identity(model=NAME)
        )
    if fits:
        said, _ = fill(ModelConfig(name=NAME, args=args, weights=str(place)), 10, ours)
        assert ": 20 of 20 parameters" in said
        return
    with pytest.raises(CheckpointError, match=r"pos_embed is of images of .*model.skip = \["):
        fill(ModelConfig(name=NAME, args=args, weights=str(place)), 10, ours)
    said, _ = fill(ModelConfig(name=NAME, args=args, weights=str(place), skip=("pos_embed",)), 10, ours)
    assert "left as drawn from the seed: pos_embed" in said


class Patches(nn.Module):
    """A model of one's own whose position embedding has the size of the images."""

    def __init__(self, num_classes: int, img_size: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, img_size, 4))
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return cast("torch.Tensor", self.head((images.mean((1, 3)).unsqueeze(-1) + self.pos_embed).mean(1)))


@register_model
def patches_of_ones_own(pretrained: bool = False, num_classes: int = 10, img_size: int = 16, **_: object) -> Patches:
    return Patches(num_classes, img_size)


@pytest.mark.parametrize(("size", "classes"), [(32, 10), (16, 7), (32, 7)])
def test_a_function_that_takes_no_weights_does_not_begin_with_random_ones(
    tmp_path: Path, size: int, classes: int
) -> None:
    safetensors.torch.save_file(Patches(10, 16).state_dict(), tmp_path / "own.safetensors")
    weights = str(tmp_path / "own.safetensors")
    config = ModelConfig(name="patches_of_ones_own", args={"img_size": size}, weights=weights)
    with pytest.raises(CheckpointError, match="takes no notice of pretrained weights") as refused:
        fill(config, classes, size)
    assert ("(10, 4) there" in str(refused.value)) == (classes != 10)
    assert ("(1, 16, 4) there" in str(refused.value)) == (size != 16)
    if size == 16:  # as the error says
        report, ours = fill(config.model_copy(update={"skip": ("head.",)}), classes, size)
        assert "1 of 3 parameters" in report
        assert torch.equal(ours["pos_embed"], safetensors.torch.load_file(tmp_path / "own.safetensors")["pos_embed"])


@register_model
def draws_by_a_generator_of_its_own(pretrained: bool = False, num_classes: int = 10, **_: object) -> Patches:
    model = Patches(num_classes, 16)
    model.pos_embed.data = torch.randn(1, 16, 4, generator=_OWN_DRAWS)
    return model


_OWN_DRAWS = torch.Generator().manual_seed(1)


def test_a_model_that_draws_by_itself_and_takes_no_weights_is_refused() -> None:
    name = draws_by_a_generator_of_its_own.__name__
    tensors = {n: t.detach() + 1 for n, t in Patches(10, 16).named_parameters() if n == "pos_embed"}
    with pytest.raises(CheckpointError, match="takes no notice of pretrained weights, such as pos_embed"):
        adapted(tensors, name, {"num_classes": 10})


@pytest.mark.drill  # five cold starts
def test_a_run_begins_with_a_hubs_model_and_needs_it_never_again(
    digits: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub" / "models--timm--some_vit"  # as huggingface_hub lays it out
    snapshot = cache / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(snapshot.name)
    (snapshot / "model.safetensors").write_bytes(pretrained.read_bytes())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SETFORMER_COLD_TESTS", "1")  # the hub's library reads its environment when it is imported
    words = [f"model.name={NAME}", "~model.args", "model.weights=hf-hub:timm/some_vit", "schedule.steps=4",
             "~schedule.epochs", "schedule.warmup_epochs=0.0", "checkpoint.every_steps=2",
             "batch.global_size=8"]  # fmt: skip
    made = train_words(digits, tmp_path / "runs", ranks=1)
    ended = setformer(*(w for w in made if w != "schedule.epochs=1" and not w.startswith("schedule.warm")), *words)
    assert ended.code == 0, ended.err
    assert "begins with the weights of hf-hub:timm/some_vit: 150 of 152 parameters" in ended.err + ended.out + "".join(
        path.read_text() for path in (tmp_path / "runs" / "demo" / "logs").iterdir()
    )
    (snapshot / "model.safetensors").unlink()
    run = str(tmp_path / "runs" / "demo")
    for command in (("predict", run, str(next((digits / "images" / "val" / "3").iterdir()))),
                    ("eval", run), ("ckpt", "export", run, str(tmp_path / "out"))):  # fmt: skip
        again = setformer(*command)
        assert again.code == 0, again.err
    gone = setformer(*(w for w in made if w != "schedule.epochs=1" and not w.startswith("schedule.warm")),
                     *words, "run.name=other")  # fmt: skip
    assert gone.code == 2, gone.err
    assert "hf-hub:timm/some_vit cannot be fetched" in gone.err


def test_a_pickle_is_refused_with_the_command_that_converts_it(pretrained: Path, tmp_path: Path) -> None:
    table = safetensors.torch.load_file(pretrained)
    wrapped = {f"module.{name}": tensor for name, tensor in table.items()}
    torch.save({"state_dict": wrapped, "epoch": 3, "optimizer": {}}, tmp_path / "model.pth")
    ended = setformer("ckpt", "convert", str(tmp_path / "model.pth"), str(tmp_path / "model.safetensors"))
    assert ended.code == 0, ended.err
    found = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert found.keys() == table.keys()
    modes = {(tmp_path / name).stat().st_mode & 0o777 for name in ("model.pth", "model.safetensors")}
    assert len(modes) == 1, "its mode does not follow the umask"
    assert all(torch.equal(found[name], table[name]) for name in table)
    again = setformer("ckpt", "convert", str(tmp_path / "model.pth"), str(tmp_path / "model.safetensors"))
    assert (again.code, "already exists" in again.err) == (2, True)


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.ones(2), "b.weight": torch.tensor([1.0, float("nan")])}, tmp_path / "model.pth")
    ended = setformer("ckpt", "convert", str(tmp_path / "model.pth"), str(tmp_path / "model.safetensors"))
    assert ended.code == 4
    assert "b.weight has values that are not numbers (NaN)" in ended.err
    assert not (tmp_path / "model.safetensors").exists()


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return (eval, ("open('ran', 'w')",))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": _Runs()}, tmp_path / "evil.pth")
    ended = setformer("ckpt", "convert", str(tmp_path / "evil.pth"), str(tmp_path / "out.safetensors"), cwd=tmp_path)
    assert ended.code == 4, ended.err
    assert len(ended.error_lines) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]
    (tmp_path / "evil.pth").write_bytes(b"no pickle")
    ended = setformer("ckpt", "convert", str(tmp_path / "evil.pth"), str(tmp_path / "out.safetensors"))
    assert (ended.code, len(ended.error_lines)) == (4, 1)
    torch.save([torch.ones(2)], tmp_path / "evil.pth")
    ended = setformer("ckpt", "convert", str(tmp_path / "evil.pth"), str(tmp_path / "out.safetensors"))
    assert (ended.code, "no weights by name" in ended.err) == (4, True)
