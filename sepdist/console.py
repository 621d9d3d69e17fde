"""The console of the programs, on stderr: one-line errors, exit statuses and the progress bar."""

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Stopped(KeyboardInterrupt):
    """The signal `number` (SIGTERM, SIGHUP) stopped the program, as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_to(handler: Callable[[int], object], *more: signal.Signals) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT, SIGTERM, SIGHUP or one of `more` inside.

    A signal that the caller ignores, as nohup does with SIGHUP, stays ignored. Outside the main
    thread, where Python allows no handlers, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, *more)
        before = {number: signal.getsignal(number) for number in numbers}
    heard = {number for number, old in before.items() if old is not signal.SIG_IGN}
    for number in heard:
        signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, before[number])


def stop_behind(error: BaseException | None) -> KeyboardInterrupt | None:
    """The signal that an error came of: Python 3.11 wrapped it, or a clean-up after it failed."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error


@contextmanager
def user_console(also: type[Exception] = OSError, stopped: str = "") -> Iterator[Console]:
    """Print OSError, ValueError and `also` as one line and exit 1.

    On Ctrl-C print that it stopped, with what `stopped` adds, and exit 130; on SIGTERM 143. A
    closed pipe is left to `sepdist.cli.main`.
    """
    console = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    logging.basicConfig(level=logging.WARNING)
    try:
        yield console
    except (KeyboardInterrupt, Exception) as error:
        if (stop := stop_behind(error)) is not None:
            console.print(f"stopped; {stopped}" if stopped else "stopped")
            sys.exit(128 + getattr(stop, "number", signal.SIGINT))  # as a shell reports it
        if isinstance(error, BrokenPipeError) or not isinstance(error, (OSError, ValueError, also)):
            raise
        console.print(f"error: {printable(str(error))}")
        sys.exit(1)


@contextmanager
def progress_bar(
    console: Console, description: str, total: float | None = None
) -> Iterator[Callable[..., None]]:
    """Show a progress bar on a terminal; yields advance(amount=1, total=None, text="")."""
    title = TextColumn("{task.description}", markup=False)  # as it is, with any braces
    with Progress(
        *(title, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
        TextColumn("{task.fields[text]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task(description, total=total, text="")

        def advance(amount: float = 1, total: float | None = None, text: str = "") -> None:
            progress.update(task, advance=amount, total=total, text=text)

        yield advance


def printable(text: str, allowed: str = "\n") -> str:
    """Text with escapes for characters of strangers' files that could drive a terminal."""
    return "".join(one if one.isprintable() or one in allowed else repr(one)[1:-1] for one in text)
