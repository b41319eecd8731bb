"""URLs without what is secret in them: user, password and query (signatures are in the query).

A URL with credentials stays in the memory of the run that was given it. Whatever is written or shown goes through here:
config.json and trainer.json, logs, the ledger, errors, tracebacks.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

_END = r"\s'\"<>\\"
_URL = re.compile(rf"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^/?#{_END}]*@)?([^?{_END}]*)(?:\?[^{_END}]*)?")


def redacted(text: str) -> str:
    """Return a text whose URLs have lost user, password and query."""
    return _URL.sub(r"\1\2", text) if "://" in text else text


def redacted_json(value: Any) -> Any:
    """Return a JSON-able value, every text of which is `redacted`."""
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {key: redacted_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_json(inner) for inner in value]
    return value


class RedactingFormatter(logging.Formatter):
    """A formatter of log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return redacted(super().format(record))


def redact_tracebacks() -> None:
    """Print uncaught errors of this process without secrets; those of threads go to the log, where there is one.

    The thread that joins it reports its error; TensorBoard's writer may fail without loss to the run.
    """

    def shown(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        print(redacted("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if logging.root.handlers and args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "?"
            log.error("thread %s failed", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
        else:
            shown(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = shown
    threading.excepthook = of_thread
