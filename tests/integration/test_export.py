"""What `setformer ckpt export` writes is read by plain timm with the same result as `setformer eval`."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.testing.commands import ROOT, environment, setformer, train_words

# Plain timm: our package registers the architecture, and nothing else of it is used.
SCORE = """
import sys, timm, torch, setformer_dist.models
from pathlib import Path
from PIL import Image
dest, images = sys.argv[1:]
model = timm.create_model(f"local-dir:{dest}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
names, right, count = model.pretrained_cfg["label_names"], 0, 0
for path in sorted(Path(images).glob("*/*.png")):
    with torch.no_grad():
        best = model(transform(Image.open(path).convert("RGB")).unsqueeze(0)).argmax().item()
    right, count = right + (names[best] == path.parent.name), count + 1
print(right, count)
"""


@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param((), marks=pytest.mark.drill),
        ("data.image_size=32", "data.augment.crop=resized", "data.eval_crop=0.8", "data.interpolation=bilinear",
         "data.mean=[0.4, 0.45, 0.5]", "model.name=vit_tiny_patch16_224", "~model.args", "model.args.depth=2"),
    ],
    ids=["demo", "another size"],
)  # fmt: skip
def test_plain_timm_scores_as_eval_does(digits: Path, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    ended = setformer(*train_words(digits, tmp_path, *overrides, "data.augment.pad=2", ranks=1))
    assert ended.code == 0, ended.err
    scored = setformer("eval", str(tmp_path / "demo"))
    top1, samples = re.findall(r"top-1 ([\d.]+)%.* on (\d+) samples", scored.out)[0]
    exported = setformer("ckpt", "export", str(tmp_path / "demo"), str(tmp_path / "out"))
    assert exported.code == 0, exported.err
    done = subprocess.run(
        [sys.executable, "-c", SCORE, str(tmp_path / "out"), str(digits / "images" / "val")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200, check=True,
    )  # fmt: skip
    right, count = map(int, done.stdout.split())
    assert count == int(samples)
    # PIL resizes to uint8 in another rounding than torch; where nothing is resized all are the same.
    assert abs(right - round(float(top1) * count / 100)) <= (2 if overrides else 0)
    again = setformer("eval", str(tmp_path / "out"), "--data", str(digits))
    assert again.code == 0, again.err
    assert again.out.partition(": ")[2] == scored.out.partition(": ")[2]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["label_names"] == [str(digit) for digit in range(10)]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1, "the weights are readable by others than the card"
    assert 'timm.create_model("local-dir:out", pretrained=True)' in (tmp_path / "out" / "README.md").read_text()
