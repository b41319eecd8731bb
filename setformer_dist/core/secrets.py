"""Texts without secrets: of URLs user, password, query and fragment's values; values that a name gives away.

Signatures are in the query.

A URL with credentials stays in the memory of the run that was given it. Whatever is written or shown goes through here:
config.json and trainer.json, logs, the ledger, errors, tracebacks.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from setformer_dist.core.words import plain_page

log = logging.getLogger(__name__)

_END = r"\s'\"<>\\"
# A password that is not escaped may hold / ? # and quotes: it begins at a colon that no port follows, and ends at the
# last @ of the word; or it was cut at its ? and has no @ any more. A path that was made of a URL has one slash.
_NO_PORT = rf"[^/?#:@\[{_END}]*:(?!\d+(?:\W|$)|[/?#{_END}]|$)"
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://|\b(?:https?|ftp|s3|gs|az|abfs):/"
_URL = re.compile(
    rf"({_SCHEME})(?:{_NO_PORT}[^\s]*@|[^/?#{_END}]*@)?(?:{_NO_PORT}[^/?#{_END}]*)?([^?{_END}]*)(?:\?[^{_END}]*)?"
)


_REST = re.compile(rf"(?:{_SCHEME})[^{_END}]*")
_VALUES_FROM = ("#", "%3f")  # a fragment, a ? that is escaped

# Names of keys and environment variables whose values are nobody's business: WANDB_API_KEY, SLURM_JWT, api_token.
_SECRET = re.compile(
    r"(?:^|[_.-])(?:key|apikey|token|secret|password|passwd|pwd|credentials?|auth|jwt|cookie|signature)"
    r"(?:$|[_.-])",
    re.I,
)
MASK = "***"
# In source text: a quoted literal that such a name is given (but for plain "key"), and tokens of well-known forms.
_GIVEN = re.compile(
    r"""([\w.-]*(?:[_.-]keys?|apikey|token|secret|password|passwd|pwd|credentials?|jwt|cookie)["']?\]?\s*[:=]\s*["'])"""
    r"""([^"'\s]{8,})(?=["'])""",
    re.I,
)
_TOKEN = re.compile(r"\b(?:hf_|gh[pousr]_|glpat-|sk-|xox[abp]-|AKIA|eyJ)[A-Za-z0-9_.-]{16,}")


def names_secret(name: str) -> bool:
    """Return whether a key or an environment variable of this name holds a secret, as far as names tell."""
    return _SECRET.search(name) is not None


def redacted_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command without secrets: those of URLs, and the values of NAME=VALUE and --NAME VALUE."""
    found: list[str] = []
    hide = False
    for word in words:
        name, sign, value = word.partition("=")
        secret = names_secret(name)
        if hide and not word.startswith("-"):
            found.append(MASK)
        else:
            found.append(f"{name}={MASK}" if secret and sign and value else redacted(word))
        hide = secret and not sign and word.startswith("-")
    return found


def redacted_source(text: str) -> str:
    """Return source text, such as a diff, without secrets of URLs, literals given to secret names, and tokens."""
    return _TOKEN.sub(MASK, _GIVEN.sub(rf"\1{MASK}", redacted(text)))


def redacted(text: str) -> str:
    """Return a text whose URLs have lost user, password, query, and values in their fragment."""
    return _REST.sub(_without_values, _URL.sub(r"\1\2", text)) if ":/" in text else text


def _without_values(url: re.Match[str]) -> str:
    """Return a URL up to where values begin that are no part of its path, such as #access_token=…"""
    text = url.group()
    lower = text.lower()
    for mark in _VALUES_FROM:
        at = lower.find(mark)
        if at >= 0 and ("=" in lower[at:] or "%3d" in lower[at:]):
            text, lower = text[:at], lower[:at]
    return text


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
    """A formatter of log lines, tracebacks included, without secrets and without control characters."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return plain_page(redacted(super().format(record)))


def redact_tracebacks() -> None:
    """Print uncaught errors of this process without secrets; those of threads go to the log, where there is one.

    The thread that joins it reports its error; TensorBoard's writer may fail without loss to the run.
    """

    def shown(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        text = redacted("".join(traceback.format_exception(kind, error, trace)))
        print(plain_page(text), end="", file=sys.stderr, flush=True)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        if logging.root.handlers and args.exc_value is not None:
            name = args.thread.name if args.thread is not None else "?"
            log.error("thread %s failed", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback))
        else:
            shown(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = shown
    threading.excepthook = of_thread
