"""What is printed comes whole: on a terminal of any width, and where there is no terminal."""

from __future__ import annotations

import ast
import errno
import io
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.panel import Panel
from rich.text import Text

from launch.cli.bars import progress_bar
from launch.cli.main import AboveBar, main
from launch.cli.usage import system_fault
from launch.run import keys
from launch.run.config import load_run, resolve
from launch.run.session import log_to_file
from setformer_dist.core.ranks import RankInfo
from setformer_dist.core.secrets import RedactingFormatter
from setformer_dist.core.shared_memory import no_memory
from setformer_dist.core.terminal import open_console, open_table, print_heading
from setformer_dist.engine.progress import RunProgress

ROOT = Path(__file__).parent.parent.parent
MESSAGE = " ".join(f"word{number}" for number in range(60))
CELLS = ("2026-11-28T05:47:13.123456+00:00", "top1 0.1234 loss 0.2362", "/a/long/path/" + "x" * 120, "complete")


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(params=["stdout", "stderr"])
def stream(request, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    return request.param


def print_all(monkeypatch, stream: str, file: io.StringIO) -> list[str]:
    monkeypatch.setattr(sys, stream, file)
    console = open_console(stderr=stream == "stderr")
    table = open_table("written", "metrics", "path", "state")
    table.add_row(*CELLS)
    console.print(MESSAGE)
    console.print(table)
    print_heading(console, "heading")
    return file.getvalue().splitlines()


@pytest.mark.parametrize("force_color", [False, True])
def test_a_pipe_gets_whole_lines_and_whole_cells(stream, force_color, monkeypatch):
    if force_color:  # rich takes such a pipe for a terminal
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    lines = print_all(monkeypatch, stream, io.StringIO())
    plain = [line.replace("\x1b[0m", "").replace("\x1b[1m", "") for line in lines]
    assert plain[0] == MESSAGE
    assert sum(all(cell in line for cell in CELLS) for line in plain) == 1
    assert all(len(line) < 500 for line in plain)  # and none is filled up to the width


@pytest.mark.parametrize("columns", [30, 40, 80])
def test_a_narrow_terminal_folds_cells_and_cuts_none(stream, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    message, *lines = (
        line.replace("\x1b[0m", "").replace("\x1b[1m", "") for line in print_all(monkeypatch, stream, Terminal())
    )
    assert message == MESSAGE  # the terminal wraps it, so that it can be copied in one piece
    assert all(len(line) <= columns for line in lines)
    rows = [line.strip("│").split("│") for line in lines if line.startswith("│")]
    for number, cell in enumerate(CELLS):
        shown = "".join(row[number] for row in rows).replace(" ", "")
        assert shown == cell.replace(" ", "")


def test_columns_hold_for_a_pipe_too(stream, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert all(len(line) <= 60 for line in print_all(monkeypatch, stream, io.StringIO())[1:])


def test_what_rank_0_says_is_one_line_of_a_log(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with RunProgress(10, 0, visible=True) as progress:
        progress.say(f"{MESSAGE} [of runs/a[1]]")
        progress.figures(0.5, 1000.0, 12, 1.0, 1e-3)
    said, figures = sys.stderr.getvalue().splitlines()
    assert said == f"{MESSAGE} [of runs/a[1]]"
    assert figures.endswith("12 damaged samples replaced (see the log)")


def test_a_bar_says_that_the_run_evaluates(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with RunProgress(10, 0, visible=True) as progress:
        progress.figures(0.5, 1000.0, 0, 1.0, 1e-3)
        with progress.busy("evaluating"):
            progress.say("in between")
        progress.say("after it")
    during, _, after = sys.stderr.getvalue().partition("after it")
    assert "evaluating · epoch 1.0" in during
    assert "evaluating" not in after


def test_consoles_and_tables_are_opened_in_one_place():
    here = {"setformer_dist/core/terminal.py"}
    for folder in ("launch", "setformer_dist", "dataloaders", "checkpoints"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if str(path.relative_to(ROOT)) in here:
                continue
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            names = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
            assert not names & {"Console", "Table"}, f"{path}: use open_console and open_table"


CLOSED = """
import os, sys
from setformer_dist.core.terminal import open_closed_streams
held = os.open(os.devnull, os.O_RDONLY) if sys.argv[1] == "taken" else None
open_closed_streams()
print("nowhere", file=sys.stderr)
print(f"{held} {os.readlink('/proc/self/fd/0')} {os.readlink('/proc/self/fd/2')} {sys.stdin.read()!r}")
"""


@pytest.mark.parametrize("way", ["free", "taken"])
def test_a_process_without_stderr_prints_nowhere(way: str) -> None:
    """No file that is opened later gets the number 2, where a library would write its warnings into it."""
    words = [sys.executable, "-c", CLOSED, way]
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" <&- 2>&-', *words], capture_output=True, text=True, check=True)
    assert done.stdout == f"{'0' if way == 'taken' else None} /dev/null /dev/null ''\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "no"), "standard output cannot be used: No space left on device; make room there"),
        (OSError(errno.EROFS, "no", "a/b"), "a/b cannot be used: Read-only file system; name another place"),
        (OSError(errno.EMFILE, "no", "a/b"), "the system refuses: Too many open files; raise the limit of open files"),
        (BlockingIOError(errno.EAGAIN, "no"), "raise the limits of memory and processes"),
        (FileNotFoundError(errno.ENOENT, "no", "a"), None),  # a defect of ours shows its traceback
        (OSError("no"), None),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(error: OSError, said: str | None) -> None:
    fault = system_fault(error)
    assert fault is None if said is None else fault is not None and said in fault


def test_a_present_folder_that_was_removed_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(FileNotFoundError) as caught:
        Path.cwd()
    assert system_fault(caught.value) == "the present folder was removed: cd to another one"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_is_full_is_one_sentence(error: Exception, full: bool) -> None:
    said = no_memory(error)
    assert (said is not None) == full
    assert said is None or "batch.micro" in said


def test_a_progress_bar_writes_nothing_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stderr", pipe)
    with progress_bar("opening", "reading") as steps:
        steps.start(10)
        steps.advance(10)
    assert not pipe.getvalue()


def test_ctrl_c_in_a_command_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    for owner in (sys, threading):
        monkeypatch.setattr(owner, "excepthook", owner.excepthook)
    monkeypatch.setattr(keys, "keys_named", pressed)
    monkeypatch.setattr(sys, "argv", ["setformer", "config", "optim.lr"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


def test_ctrl_c_while_the_commands_are_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")  # stands for the signal, at the first import
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-m", "launch.cli", "--version"], env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130
    assert ended.stderr == "stopped by Ctrl-C\n"


@pytest.mark.parametrize("words", [["--version"], ["config"]])
def test_output_that_finds_no_room_is_one_sentence(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner in (sys, threading):
        monkeypatch.setattr(owner, "excepthook", owner.excepthook)
    monkeypatch.setattr(sys, "argv", ["setformer", *words])
    with Path("/dev/full").open("w", buffering=1 << 20) as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as ended:
            main()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # what is left must go somewhere
    assert ended.value.code == 9
    said = "error: standard output cannot be used: No space left on device; make room there\n"
    assert capsys.readouterr().err == said


def test_the_log_of_a_rank_takes_any_name_in_any_locale(tmp_path: Path) -> None:
    page = ROOT / "configs" / "runs" / "demo.toml"
    level = logging.root.level
    handler = log_to_file(resolve(load_run(page, [f"run.out={tmp_path}"]), 1), RankInfo())
    try:
        assert isinstance(handler, logging.FileHandler)
        assert handler.encoding == "utf-8"
        handler.handle(logging.makeLogRecord({"msg": "· \udcff", "levelno": 30, "levelname": "WARNING"}))
    finally:
        logging.root.removeHandler(handler)
        logging.root.setLevel(level)
        handler.close()
    assert Path(handler.baseFilename).read_text(encoding="utf-8").endswith("· \\udcff\n")


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202eback\x00\ud800 end\ttab"
SHOWN = "a\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202eback\\x00\\ud800 end"


def test_no_text_steers_a_terminal(stream, monkeypatch):
    """Rich takes out some control characters, but neither ESC nor what turns the direction of writing."""
    file = io.StringIO()
    monkeypatch.setattr(sys, stream, file)
    console = open_console(stderr=stream == "stderr")
    table = open_table(HOSTILE, title=HOSTILE)
    table.add_row(HOSTILE)
    table.add_row(Text(HOSTILE))
    for shown in (HOSTILE, table, Text(HOSTILE), Panel(HOSTILE)):
        console.print(shown, markup=False, highlight=False)
    handler = AboveBar(console=console, show_time=False, show_path=False)
    handler.emit(logging.makeLogRecord({"msg": HOSTILE, "levelno": 40, "levelname": "ERROR"}))
    said = file.getvalue().replace("\r\x1b[2K", "")  # what AboveBar itself sends
    assert said.count("\\x1b[31mred") == 8
    assert not [c for c in said if not c.isprintable() and c != "\n"]


def test_styles_of_ours_still_reach_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    monkeypatch.setattr(sys, "stdout", file)
    console = open_console()
    console.print(Text(HOSTILE, style="bold"))
    assert file.getvalue().startswith("\x1b[1ma\\x1b[31mred")


def test_log_files_hold_no_control_characters():
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        record = logging.makeLogRecord({"msg": f"first {HOSTILE}\nsecond", "exc_info": sys.exc_info()})
    lines = RedactingFormatter("%(message)s").format(record).split("\n")
    assert lines[0].startswith(f"first {SHOWN}")
    assert lines[1] == "second"
    assert all(line.isprintable() for line in lines)
    assert len(lines) > 3
