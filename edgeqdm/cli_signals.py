"""Ctrl-C and SIGTERM as exceptions, even where native code swallows those."""

from __future__ import annotations

import signal
from typing import NoReturn

TERMINATED = 143

_sent: list[int] = []
"""What this run was sent, latest last."""


def listen() -> None:
    """Stop the run by an exception at SIGTERM and, unless the caller has it ignored, Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def forget() -> None:
    """Begin a run, which knows nothing of the signals of another."""
    _sent.clear()


def sent() -> BaseException | None:
    """What the latest signal of this run stands for, or None if there was none.

    Its exception may not have arrived: native code makes an error of its own of it, or none.
    """
    return _exception_of(_sent[-1]) if _sent else None


def _stop(number: int, frame: object) -> NoReturn:
    _sent.append(number)
    # An exception, so that half-written output is cleaned up; a second SIGTERM must not stop that.
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)
    raise _exception_of(number)


def _exception_of(number: int) -> BaseException:
    return SystemExit(TERMINATED) if number == signal.SIGTERM else KeyboardInterrupt()
