"""No test's signal may reach the process that runs the tests."""

import ast
from pathlib import Path

import pytest

from launch.testing.commands import ROOT

SENDS = ("killpg", "os.kill", "send_signal", ".terminate(", ".kill(", "kill_ranks")
FILES = sorted(path for folder in ("tests", "setformer_dist/testing") for path in (ROOT / folder).rglob("*.py"))


def own_group(call: ast.Call) -> bool:
    return any(k.arg == "start_new_session" and getattr(k.value, "value", None) is True for k in call.keywords)


def starts(tree: ast.AST) -> list[ast.Call]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).endswith("Popen")]


def test_what_gets_a_signal_has_a_session_of_its_own():
    """A group that a test's process shares with the tests carries its Ctrl-C, or a `killpg`, back to them."""
    found = []
    for path in FILES:
        text = path.read_text()
        if any(word in text for word in SENDS):
            found += [
                f"{path.relative_to(ROOT)}:{call.lineno}"
                for call in starts(ast.parse(text))
                if not own_group(call) and path.name != "warm.py"  # it stands in for Popen, and forks in a session
            ]
    assert not found


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("subprocess.Popen(['a'])", False),
        ("subprocess.Popen(['a'], start_new_session=False)", False),
        ("subprocess.Popen(['a'], start_new_session=True)", True),
    ],
)
def test_the_check_itself(text, held):
    (call,) = starts(ast.parse(text))
    assert own_group(call) is held


def test_no_test_kills_a_group_of_others():
    """`os.killpg` and negative numbers are for groups that a test has made; none is needed so far."""
    for path in FILES:
        if Path(path).name != Path(__file__).name:
            assert "killpg(" not in path.read_text(), path
