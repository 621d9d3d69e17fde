"""What the programs say to people, on stderr: an error of the user is one line and exit status 1, Ctrl-C is 130."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def user_console(also: type[Exception] = OSError, stopped: str = "") -> Iterator[Console]:
    """A program's console; OSError, ValueError and `also` are the user's, `stopped` is said after a Ctrl-C."""
    console = Console(stderr=True)
    logging.basicConfig(level=logging.WARNING)
    try:
        yield console
    except KeyboardInterrupt:
        if stopped:
            console.print(f"stopped; {stopped}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
    except (OSError, ValueError, also) as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


@contextmanager
def progress_bar(console: Console, description: str, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on a terminal; yields the function that advances it by one."""
    columns = (TextColumn(description), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
