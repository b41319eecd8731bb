import os
import tomllib
from pathlib import Path

import pytest

from launch.run.config import RunConfig, check_folder, load_run, resolve
from launch.run.dry_run import as_overrides
from setformer_dist.core import config as base
from setformer_dist.core.config import (
    LARGEST_CONFIG,
    all_keys,
    apply_override,
    first_key,
    meaning,
    merge,
    parse_override,
    read_toml,
)
from setformer_dist.core.continuing import must_stay
from setformer_dist.core.errors import ConfigError
from setformer_dist.core.files import write_json, write_state

CONFIGS = Path(__file__).parent.parent.parent / "configs" / "runs"
DEMO = CONFIGS / "demo.toml"

# Options of timm's train.py and arguments of Lightning's Trainer, as keys.
TIMM = [
    "opt",
    "sched",
    "warmup_epochs",
    "weight_decay",
    "amp",
    "model_ema",
    "mixup",
    "cutmix",
    "smoothing",
    "drop_path",
    "clip_grad",
    "workers",
    "seed",
    "output",
    "experiment",
    "resume",
    "val_split",
    "mean",
    "std",
    "crop_pct",
    "input_size",
    "img_size",
    "batch_size",
    "epochs",
    "lr",
    "log_interval",
    "data_dir",
    "aa",
    "mixup_off_epoch",
    "aug_repeats",
    "reprob",
    "hflip",
    "color_jitter",
    "layer_decay",
    "min_lr",
    "warmup_lr",
    "eval_metric",
    "checkpoint_hist",
    "initial_checkpoint",
    "num_classes",
]
LIGHTNING = [
    "max_epochs",
    "max_steps",
    "accelerator",
    "devices",
    "precision",
    "gradient_clip_val",
    "accumulate_grad_batches",
    "num_nodes",
    "ckpt_path",
    "strategy",
    "log_every_n_steps",
    "check_val_every_n_epoch",
    "default_root_dir",
    "deterministic",
]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr': did you mean optim.lr?"),
        ("lr=1", "unknown key 'lr': did you mean optim.lr?"),
        ("optim.lr=fast", "optim.lr = 'fast': input should be a valid number"),
        ("run.seed=1.5", "run.seed = 1.5: input should be a valid integer"),
        ("zero.stage=4", "zero.stage = 4: input should be 0, 1, 2 or 3"),
        ("schedule.steps=10", "give either epochs or steps, not both (on the command line, ~schedule.epochs"),
        ("~schedule.epochs", "schedule: give epochs or steps, the length of the run"),
        ("~batch", "table [batch] is missing, with keys such as batch.global_size"),
        ("~batch.global_size", "key 'batch.global_size' is missing"),
        ("checkpoint.best_metric=ema_top1 ema.decay=0", "needs averaged weights: set ema.decay"),
        ("batch.micro=0", "must be a positive number of samples"),
        ("run.name=a/b", "must be a folder name"),
        ("trainer.epochs=3", "unknown table 'trainer' with 'epochs': did you mean schedule.epochs?"),
        ("a.b.max_epochs=3", "unknown table 'a' with 'max_epochs': did you mean schedule.epochs?"),
        ("trainer.devices=3", "unknown table 'trainer' with 'devices': ranks are given by --ranks"),
        ("data.trim=true", "unknown key 'data.trim': only another kind of [data] has it"),
        ("seed=3", "unknown key 'seed': did you mean run.seed?"),
        ("data.seed=3", "unknown key 'data.seed': did you mean run.seed?"),
        ("mean=[1,1,1]", "did you mean data.mean?"),
        ("schedule.epoch=3", "did you mean schedule.epochs?"),
        ("checkpoint_hist=3", "did you mean checkpoint.keep_last?"),
        ("data=data/photos", "name a key of it, such as data.root=data/photos"),
        ("optim=adamw", "name a key of it, such as optim.name=adamw"),
        ("eval=3", "eval is a table of keys, not 3: name a key of it, such as eval.every_epochs"),
        ("batch.micro=x", "demo.toml: batch.micro = 'x': input should be a valid integer or 'auto'"),
        (
            "model.recompute=x",
            "recompute = 'x': input should be 'none', 'cheap', 'mlp', 'block' or 'offload' or a list",
        ),
        ("model.recompute=['x']", "; model.recompute.0 = 'x': input should be 'none', 'cheap', 'mlp', 'block'"),
        ("data.mean=0.5", "data.mean = 0.5: input should be a list"),
        ("optim.betas=0.9,0.95", "should be a list, on the command line 'optim.betas=[0.9, 0.95]'"),
        ("run.imports=a,b", """should be a list, on the command line 'run.imports=["a", "b"]'"""),
        ("checkpoint.allow_changes=[data]", """on the command line 'checkpoint.allow_changes=["data"]'"""),
        ("drop_rate=0.1", "dropout is an argument of the model: model.args.drop_rate"),
        ("optim.schedule=cosine", "did you mean schedule.name?"),
        ("vflip=0.5", "did you mean data.augment.vflip?"),
        ("model.memory_budget=20", "model.memory_budget: 20 is no size: write it as '20 GiB' or '900 MiB'"),
        ("model.memory_budget=lots", "demo.toml: model.memory_budget: 'lots' is no size: write it as '20 GiB'"),
        ("data.resolutions=[{stepp=4,image_size=64}]", "did you mean data.resolutions.0.step?"),
        ("data.resolutions=[{step=4,size=64}]", "did you mean data.resolutions.0.image_size?"),
        ("data.resolutions=[{from_step=4,image_size=64}]", "did you mean data.resolutions.0.step?"),
        ("data.root=~/x", "data.root = '~/x': ~ is not expanded here: write the whole path, or $HOME"),
        ("run.out=~", "run.out = '~': ~ is not expanded here"),
        ('data.mixture=[{root="~/x",train="a",weight=1}]', "data.mixture.0.root = '~/x': ~ is not expanded here"),
    ],
)
def test_a_bad_key_is_named_with_the_repair(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(DEMO, override.split(" "))
    assert sentence in str(error.value)


def test_a_place_is_named_once() -> None:
    with pytest.raises(ConfigError, match=r"demo.toml: schedule.power belongs to"):
        load_run(DEMO, ["schedule.power=3.0"])


@pytest.mark.parametrize(
    "override",
    ["zero.stage=x{}", "{}", "x{}=1", "optim.{}=1", "+{}", "~{}", "optim.name=\a{}", "data={}", "data.root=~/{}"],
)
def test_what_is_long_is_repeated_in_part(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(DEMO, [override.format("x" * 5000)])
    assert "characters)" in str(error.value)
    assert len(str(error.value)) < 1200


def test_a_folder_that_is_named_tilde_and_names_with_one_are_taken(tmp_path: Path) -> None:
    config = load_run(DEMO, ["data.root=./~/x", "data.train=~train", f"run.out={tmp_path}/~"])
    assert (config.data.root, config.data.train, config.run.out) == ("./~/x", "~train", f"{tmp_path}/~")


def test_what_other_programs_call_keys_are_no_keys_here_and_mean_some() -> None:
    keys = all_keys(RunConfig)
    for name, meant in RunConfig.SYNONYMS.items():
        assert name == name.lower()
        assert name not in keys
        assert " " in meant or meant in keys, name


@pytest.mark.parametrize("name", TIMM + LIGHTNING)
def test_options_of_timm_and_keys_of_lightning_are_known(name: str) -> None:
    meant = first_key(RunConfig, name) or meaning(RunConfig, name)
    assert meant is not None
    with pytest.raises(ConfigError) as error:
        load_run(DEMO, [f"{name}=5"])
    assert meant in str(error.value)


def test_a_string_is_not_read_as_a_number() -> None:
    with pytest.raises(ConfigError, match="valid number"):
        load_run(DEMO, ['optim.lr="0.1"'])


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim..lr=3"])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not of the form"):
        parse_override(text)


def test_a_tilde_takes_a_key_away() -> None:
    config = load_run(DEMO, ["~schedule.epochs", "~schedule.warmup_epochs", "schedule.steps=7"])
    assert (config.schedule.steps, config.schedule.epochs, config.schedule.warmup_epochs) == (7, None, None)
    with pytest.raises(ConfigError, match="nothing to remove"):
        load_run(DEMO, ["~schedule.nosuch"])
    with pytest.raises(ConfigError, match=r"override '~schedule.no.such': the config does not set this key"):
        load_run(DEMO, ["~schedule.no.such"])
    space = {"space": {"optim.lr": {"grid": [1.0]}, "x": 1}}  # a search space has dots in its keys
    assert apply_override(space, "~space.optim.lr") == {"space": {"x": 1}}


def test_override_values_are_toml_or_plain_text() -> None:
    assert parse_override("a.b=1e-3") == {"a": {"b": 1e-3}}
    assert parse_override("a=[1, 2]") == {"a": [1, 2]}
    assert parse_override("data.root=/some/where") == {"data": {"root": "/some/where"}}


def test_merge_goes_table_by_table() -> None:
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}}


def test_one_extends_is_followed_and_two_are_refused(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text("[a]\nx = 1\ny = 1\n")
    (tmp_path / "run.toml").write_text('extends = "base.toml"\n[a]\ny = 2\n')
    assert read_toml(tmp_path / "run.toml") == {"a": {"x": 1, "y": 2}}
    (tmp_path / "third.toml").write_text('extends = "run.toml"\n')
    with pytest.raises(ConfigError, match="only one level"):
        read_toml(tmp_path / "third.toml")


def test_a_config_that_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "huge.toml").symlink_to("/dev/zero")
    for name, said in (
        ("pipe", "is not a plain file"),
        ("folder", "is a directory: name a .toml file in it"),
        ("huge", "is not a plain file"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_toml(tmp_path / f"{name}.toml")


def test_a_missing_config_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "there.toml").write_text("")
    with pytest.raises(ConfigError, match=r"does not exist; configs there: there\.toml"):
        read_toml(tmp_path / "absent.toml")


ODD_PAGES = {
    "larger": (b"#" * (LARGEST_CONFIG + 1), "has more than 1,048,576 bytes"),
    "deep": (b"a = " + b"[" * 100_000, "nested too deeply"),
    "deep tables": (b".".join([b"a"] * 100) + b" = 1", "nested more than 64 deep"),
    "long key": (b".".join([b"a"] * 20_000) + b" = 1", "has more than 5,000 dots"),
    "long number": (b"a = " + b"9" * 10_000, "is not valid TOML"),
    "nul": (b'a = "\0"', "is not valid TOML"),
    "utf-16": ("a = 1".encode("utf-16"), "is not valid TOML"),
}


@pytest.mark.parametrize("name", ODD_PAGES)
def test_an_odd_page_is_one_sentence(tmp_path: Path, name: str) -> None:
    content, said = ODD_PAGES[name]
    (tmp_path / "page.toml").write_bytes(content)
    for path in (tmp_path / "page.toml", tmp_path / "child.toml"):
        (tmp_path / "child.toml").write_text('extends = "page.toml"')
        with pytest.raises(ConfigError, match=said):
            read_toml(path)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/full", "pipe", "loop", "."])
def test_a_page_is_a_plain_file(tmp_path: Path, path: str) -> None:
    """Neither waited for nor read without end; ranks could not read a pipe again."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"cannot be read|is a directory"):
        read_toml(tmp_path / path)


def test_a_page_from_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "page.toml").write_bytes(b"\xef\xbb\xbf[a]\r\nx = 1\r\n")
    assert read_toml(tmp_path / "page.toml") == {"a": {"x": 1}}


def test_a_deep_override_is_one_sentence() -> None:
    for text in ("a=" + "[" * 100_000, ".".join(["a"] * 1000) + "=1"):
        with pytest.raises(ConfigError, match=r"nested too deeply|at most 64 parts"):
            parse_override(text)
    assert parse_override("a=" + "9" * 10_000) == {"a": "9" * 10_000}


def test_configs_are_frozen() -> None:
    config = load_run(DEMO)
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_what_may_change_in_a_continuation() -> None:
    stay = must_stay(load_run(DEMO))
    assert {"run.seed", "model.name", "batch.global_size", "data.image_size", "data.augment.crop"} <= set(stay)
    free = ("run.name", "run.threads", "batch.micro", "zero", "data.root", "data.workers", "eval", "checkpoint")
    assert not [key for key in stay if key.startswith(free)]
    assert "batch.global_size" not in must_stay(load_run(DEMO), ["global_batch"])
    assert not [key for key in must_stay(load_run(DEMO), ["data"]) if key.startswith("data.")]


def test_a_key_added_later_means_its_default_and_an_unknown_one_is_named(tmp_path: Path) -> None:
    run = resolve(load_run(DEMO, [f"run.out={tmp_path}"]), 2)
    run.config.folder.mkdir()
    older = run.as_json()
    del older["guard"], older["optim"]["layer_decay"], older["data"]["augment"]["pad"], older["restart"]
    write_json(run.config.folder / "config.json", older)
    with pytest.raises(ConfigError, match=r"\(data\.augment\.pad is 4 there and 2 here\)"):  # the config sets 2
        check_folder(run)
    write_json(run.config.folder / "config.json", {**older, "data": run.as_json()["data"]})
    check_folder(run)
    with pytest.raises(ConfigError, match=r"guard\.spike is 0\.0 there and 3\.0 here"):
        check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", "guard.spike=3.0"]), 2))
    later = {**run.as_json(), "optim": {**run.as_json()["optim"], "lookahead": 3}}
    write_json(run.config.folder / "config.json", later)
    with pytest.raises(ConfigError, match=r"has the key 'optim\.lookahead', which this version .* does not know"):
        check_folder(run)


def test_a_run_folder_of_another_config_is_refused(tmp_path: Path) -> None:
    run = resolve(load_run(DEMO, [f"run.out={tmp_path}"]), 2)
    run.config.folder.mkdir()
    write_json(run.config.folder / "config.json", run.as_json())
    check_folder(run)
    check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", "eval.every_epochs=1", "data.workers=1"]), 2))
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.003 there and 0\.1 here"):
        check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", "optim.lr=0.1"]), 2))
    check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", "zero.stage=3", "batch.micro=16"]), 1))
    with pytest.raises(ConfigError, match=r"batch\.global_size is 64 there and 128 here"):
        check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", "batch.global_size=128"]), 2))


@pytest.mark.parametrize(
    ("overrides", "repair"),
    [
        (["batch.global_size=128"], 'to continue with the change, set checkpoint.allow_changes = ["global_batch"] '),
        (
            ["batch.global_size=128", "data.augment.pad=3"],
            'to continue with the change, set checkpoint.allow_changes = ["data", "global_batch"] ',
        ),
        (
            ["data.augment.pad=3", "batch.global_size=128", 'checkpoint.allow_changes=["data"]'],
            'to continue with the change, set checkpoint.allow_changes = ["data", "global_batch"] ',
        ),
        (["optim.lr=0.1"], 'to continue with the change, set checkpoint.allow_changes = ["schedule"] '),
        (["ema.decay=0.1", "batch.global_size=128"], 'to begin a new run with its weights, also set model.weights = "'),
    ],
)
def test_a_folder_of_another_config_says_how_its_run_can_be_used(
    tmp_path: Path, overrides: list[str], repair: str
) -> None:
    run = resolve(load_run(DEMO, [f"run.out={tmp_path}"]), 2)
    run.config.folder.mkdir()
    write_json(run.config.folder / "config.json", run.as_json())
    with pytest.raises(ConfigError) as refused:
        check_folder(resolve(load_run(DEMO, [f"run.out={tmp_path}", *overrides]), 2))
    assert repair in str(refused.value)
    (run.config.folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        check_folder(run)


def test_a_config_of_the_run_folder_that_was_changed_is_damage_and_not_another_config(tmp_path):
    run = resolve(load_run(DEMO, [f"run.out={tmp_path}"]), 2)
    path = run.config.folder / "config.json"
    path.parent.mkdir()
    write_state(path, run.as_json())
    check_folder(run)
    text = path.read_text()
    for changed in (text.replace('"seed": 0', '"seed": 1', 1), text[:-20], ""):
        assert changed != text
        path.write_text(changed)
        with pytest.raises(ConfigError, match=r"config\.json is damaged .*move the folder away"):
            check_folder(run)


def test_lines_of_a_dry_run_are_overrides_that_make_the_same_config():
    said = (
        "run.name=first",
        'run.callbacks=["alarm"]',
        'run.callback_args={alarm = {"a.b" = 1, "with space" = [{x = "ü"}], none = {}}}',
        'model.args={depth = 2, window = {"7.5" = true}}',
        'data.mixture=[{root = "a", weight = 2.0}, {root = "b \\" c", weight = 1.0}]',
        "deepspeed.fp16 = {loss_scale_window = 1e30}",
        "batch.global_size=8",
        "schedule.steps=3",
    )
    config = base.load(RunConfig, None, said)
    lines = list(as_overrides(config.model_dump(mode="json", exclude_defaults=True)))
    assert base.load(RunConfig, None, lines) == config
    assert len(lines) > len(said) - 1
    assert tomllib.loads("\n".join(lines)), "they may be copied into a file as well"
