"""The report: self-contained, true to the run's files, and unmoved by what interruptions leave in them."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from setformer_dist.core.errors import DataError
from setformer_dist.core.phases import SECTIONS
from setformer_dist.report.figures import thin
from setformer_dist.report.html import ClassifiedImage, show, write_report
from setformer_dist.report.rows import read_metrics

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Collects elements and complains of tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def train_row(step, **changes):
    row = {
        "kind": "train", "step": step, "epoch": step / 10, "loss": 2.0 / step, "lr": 1e-3, "grad_norm": 1.0,
        "images_per_s": 100.0, "tokens_per_s": 1e4, "memory_mib": 500.0, "mfu": None,
        "seconds": {name: 0.001 * (i + 1) for i, name in enumerate(SECTIONS)},
    }  # fmt: skip
    return row | changes


def eval_row(step, top1=0.5):
    return {
        "kind": "eval", "step": step, "loss": 1.0, "top1": top1, "top5": 0.9,
        "ema_loss": 0.9, "ema_top1": top1 + 0.1, "ema_top5": 0.95, "samples": 1000,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    rows = [train_row(step) for step in range(1, 31)] + [eval_row(10, 0.3), eval_row(30, 0.6)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps({"model": {"name": "setformer_tiny<&>"}}))
    summary = {
        "evaluation": {"top1": 0.6123},
        "best": {"step": 20},
        "model": "nano<",
        "images_per_s": 1234.5,
        "seconds": 3725,
        "parameters": 22_100_000,
        "ranks": 2,
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"zero_stage": 0, "dtype": "bf16", "peak": 812.5}))
    return folder


def samples():
    image = torch.arange(3 * 6 * 5, dtype=torch.uint8).reshape(3, 6, 5)
    return [
        ClassifiedImage(image, "frog", "frog", 0.93),
        ClassifiedImage(image.flip(0), "cat", "dog <b>", 0.41),
    ]


def written(run, tmp_path, images=()):
    out = tmp_path / "out" / "report.html"
    write_report(run, out, list(images))
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_from_outside(run, tmp_path):
    text = written(run, tmp_path, samples())
    page = Page(text)
    assert page.open == []
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert "url(http" not in text
    assert "@import" not in text


def test_figures_are_sound_svg_with_distinct_ids_and_page_colours(run, tmp_path):
    text = written(run, tmp_path)
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(drawings) == 5
    ids = [re.findall(r'\bid="([^"]+)"', drawing) for drawing in drawings]
    assert len({i for part in ids for i in part}) == sum(map(len, ids))
    for drawing, own in zip(drawings, ids, strict=True):
        assert ElementTree.fromstring(drawing).get("aria-label")
        assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawing)) <= set(own)
        assert not re.search(r"#[0-9a-f]{6}\b", re.sub(r'(url\(|href=")#[\w-]+', "", drawing))
        assert "currentColor" in drawing
    split = next(d for d in drawings if "stacked" in d)
    assert all(f"var(--series-{i})" in split for i in range(1, len(SECTIONS) + 1))


def test_headline_figures_are_written_as_people_read_them(run, tmp_path):
    text = written(run, tmp_path)
    for shown in ("61.23 %", "1,234", "1 h 02 min", "22.1 M", "bf16", "ZeRO stage", "my-run", "up to step 30"):
        assert shown in text
    assert "top-5 accuracy" not in text  # the summary has none
    assert "nano&lt;, recorded up to step 30" in text
    assert re.search(r"best step\s*</td>\s*<td>20</td>", text)
    assert "812.5" in text  # an unknown figure is shown all the same


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("top1", 1, "100.00 %"), ("mfu", 0.405, "40.50 %"), ("seconds", 59.0, "59 s"), ("seconds", 61, "1 min 01 s"),
        ("steps", 120_000, "120,000"), ("loss", 0.123456, "0.1235"), ("dtype", "bf16", "bf16"), ("x", [1], "[1]"),
        ("parameters", 999, "999"), ("finished", True, "true"), ("loss", math.nan, "NaN"),
    ],
)  # fmt: skip
def test_figures_as_text(key, value, text):
    assert show(key, value) == text


def test_images_come_through_unchanged_and_wrong_ones_are_marked(run, tmp_path):
    text = written(run, tmp_path, samples())
    sources = [a["src"] for tag, a in Page(text).elements if tag == "img"]
    for source, sample in zip(sources, samples(), strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))
        assert torch.equal(torch.from_numpy(pixels.copy()).permute(2, 0, 1), sample.image)
    assert "1 of 2 shown are right" in text
    assert text.count('class="card wrong"') == 1
    assert "93 %" in text
    assert "dog &lt;b&gt;" in text


def test_the_config_is_shown_escaped(run, tmp_path):
    assert "setformer_tiny&lt;&amp;&gt;" in written(run, tmp_path)


def test_no_control_character_of_a_log_a_host_or_a_config_reaches_the_page(run, tmp_path):
    bad = "\x1b[31m\x00\x9b\u202e\udc80\x7f"
    (run / "config.json").write_text(json.dumps({"run": {"name": bad}}))
    (run / "summary.json").write_text(json.dumps({"model": bad, bad: bad, "steps": 30}))
    events = [
        {"event": "attempt", "time": 1.0, "number": 1, "ranks": 2, "hosts": [bad, "b"]},
        {"event": "began", "time": 2.0, "step": 0},
        {"event": "failed", "time": 3.0, "how": bad, "step": 3},
        {"event": "ended", "time": 3.0, "why": bad, "step": 3, "final": True},
    ]
    (run / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    image = torch.zeros(3, 6, 5, dtype=torch.uint8)
    text = written(run, tmp_path, [ClassifiedImage(image, bad, bad, 0.5)])
    assert {c for c in text if not c.isprintable()} == {"\n"}
    assert text.count("\\x1b[31m") > 5


def test_the_split_table_has_means_and_shares(run, tmp_path):
    text = re.sub(r"<[^>]+>", " ", written(run, tmp_path))
    assert re.search(r"forward\s+2\.0\s+4\.4 %", text)  # 2 ms of 45 ms
    assert re.search(r"other\s+9\.0\s+20\.0 %", text)


def test_the_last_line_for_a_step_wins_and_torn_lines_are_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(train_row(s, loss=float(s))) for s in (1, 2, 3)]
    lines += ['{"kind": "train", "st{"kind": "train"}', json.dumps(train_row(2, loss=20.0)), "[1]", ""]
    lines += [json.dumps({"kind": "train", "step": "two"}), json.dumps({"kind": "other", "step": 9})]
    path.write_text("\n".join(lines) + "\n" + json.dumps(eval_row(3)) + "\n" + json.dumps(train_row(4))[:30])
    rows = read_metrics(path)
    assert [(r["step"], r["loss"]) for r in rows["train"]] == [(1, 1.0), (2, 20.0), (3, 3.0)]
    assert [r["step"] for r in rows["eval"]] == [3]


def test_a_run_that_recorded_nothing_still_has_a_page(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    text = written(folder, tmp_path)
    assert "recorded no step yet" in text
    assert "<svg" not in text
    assert Page(text).open == []


def test_values_that_are_not_finite_are_left_out_of_the_curves(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [train_row(1, loss=math.nan), train_row(2, loss=0.5), train_row(3, loss=math.inf, seconds=None)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = written(folder, tmp_path)
    assert "training from 0.5 to 0.5" in text
    assert not re.search(r"\b(nan|inf)\b", text, flags=re.IGNORECASE)


def test_long_runs_are_thinned_to_means():
    steps, values = thin(list(range(1, 1201)), [float(i % 3) for i in range(1200)])
    assert steps == list(range(3, 1201, 3))
    assert values == [1.0] * 400
    steps, values = thin(list(range(1, 402)), [1.0] * 400 + [7.0])  # the last run of points is shorter
    assert (len(steps), steps[-1], values[-1]) == (201, 401, 7.0)
    assert thin([], []) == ([], [])


def test_a_wrong_folder_and_a_damaged_summary_are_named(run, tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist"):
        write_report(tmp_path / "nowhere", tmp_path / "r.html", [])
    (run / "summary.json").write_text('{"top1": 0.')
    with pytest.raises(DataError, match=r"summary\.json is damaged.*not JSON"):
        write_report(run, tmp_path / "r.html", [])
    (run / "summary.json").write_text("[1]")
    with pytest.raises(DataError, match=r"summary\.json is damaged.*is not an object"):
        write_report(run, tmp_path / "r.html", [])


def refresh_row(step, **changes):
    figures = ("dead", "perplexity", "fit", "marginal_error")
    values = {f"{name}_{when}": 0.125 for name in figures for when in ("before", "after")} | {"movement_degrees": 12.5}
    return {"kind": "refresh", "step": step, "samples": 2048, "references": values, "seconds": 0.5} | changes


def test_refreshes_of_the_references_are_drawn_and_listed(run, tmp_path):
    assert "set by K-means" not in written(run, tmp_path)
    rows = [
        refresh_row(10, anchors={"dead_before": 0.25, "dead_after": "?"}),
        refresh_row(20),
        {"kind": "refresh", "step": 30, "samples": 3, "skipped": "too few <tokens>"},
        refresh_row(40, references=[1]),
        refresh_row(50, by="job", late="no answer of the <service>"),
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    text = written(run, tmp_path)
    assert Page(text).open == []
    assert "Reference sets set by K-means" in text
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.S)
    assert len(drawings) == 10
    assert any("gathering, before from 0.125 to 0.125" in d for d in drawings)
    assert "<td>0.125 → 0.125</td>" in text
    assert "<td>0.25 → –</td>" in text
    assert "<td>12.5</td>" in text
    assert "skipped: too few &lt;tokens&gt;" in text
    assert "computed by the ranks: no answer of the &lt;service&gt;" in text
