"""What the programs say to people, on stderr: an error of the user is one line and exit status 1, Ctrl-C is 130."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


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
