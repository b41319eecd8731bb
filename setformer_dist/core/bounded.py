"""Calls into clients that may hang, with a limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


class TooLongError(TimeoutError):
    """Some work did not end within its limit."""


def bounded(limit_s: float, work: Callable[[], T]) -> T:
    """Return what some work returns, done by a thread that is left behind where it hangs.

    Args:
        limit_s: seconds to wait for it.
        work: to be done.

    Raises:
        TooLongError: it did not end in time.
    """
    answer: Future[T] = Future()

    def do() -> None:
        try:
            answer.set_result(work())
        except BaseException as error:  # noqa: BLE001 — raised where the answer is waited for
            answer.set_exception(error)

    # A daemon, and none of an executor's, for which the interpreter would wait at its end.
    threading.Thread(target=do, name="storage client", daemon=True).start()
    if not wait((answer,), limit_s).done:
        raise TooLongError(f"nothing came for {limit_s:g} s")
    return answer.result()
