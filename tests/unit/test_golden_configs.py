"""Every shipped run, resolved and as DeepSpeed's JSON, kept as text: a changed default is a visible diff.

To accept a change: SETFORMER_GOLDEN=write pytest tests/unit/test_golden_configs.py
"""

import json
import os
from pathlib import Path

import pytest

from launch.run.config import load_run, resolve

ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "configs" / "runs").glob("*.toml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("part", ["resolved", "deepspeed"])
def test_golden(path: Path, part: str) -> None:
    run = resolve(load_run(path), 2)
    value = run.as_json() if part == "resolved" else run.deepspeed_json()
    text = json.dumps(value, indent=2) + "\n"
    golden = ROOT / "tests" / "golden" / f"{path.stem}.{part}.json"
    if os.environ.get("SETFORMER_GOLDEN") == "write":
        golden.write_text(text)
    assert golden.read_text() == text
