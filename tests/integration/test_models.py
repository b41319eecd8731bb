"""`setformer models`."""

from __future__ import annotations

from launch.testing.commands import setformer


def test_models_are_listed_with_size_and_cost() -> None:
    ended = setformer("models", "setformer_*")
    assert ended.code == 0, ended.err
    lines = {words[1]: words for line in ended.out.splitlines() if len(words := line.split()) > 8}
    assert lines["setformer_base"][3:5] == ["57.26", "M"]
    assert lines["setformer_base"][8] == "10.26"
    assert "soft_tiny" not in lines


def test_encoders_of_texts_are_listed_by_tokens() -> None:
    ended = setformer("models", "text_*")
    assert ended.code == 0, ended.err
    assert [line.split()[6:8] for line in ended.out.splitlines() if "text_" in line] == [["128", "tokens"]] * 3
    assert "a table of 8,192 tokens" in ended.err


def test_an_unknown_model_is_one_sentence() -> None:
    ended = setformer("models", "swin*")
    assert ended.code == 2
    assert len(ended.error_lines) == 1
    assert "no model is named like 'swin*'" in ended.error_lines[0]
