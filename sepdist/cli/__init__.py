"""The programs, one module per verb: `sepdist VERB ...`, or `python -m sepdist VERB ...`."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

PURPOSES = {
    "make data": {"shard": "cut a corpus into shards (write), verify or describe (info) them"},
    "train": {
        "train": "train one stage in Ray Train workers, or a sweep of runs",
        "pipeline": "run the stages of an experiment in order and write its tables",
    },
    "judge results": {
        "evaluate": "score a separator, or files of estimates, on test sets: SI-SNR, SDR, ...",
        "compare": "compare two evaluations: differences, intervals, a paired test",
        "estimate": "score an SI-SNR estimator against the true SI-SNR",
        "recognise": "measure word error rates of mixtures and of a separator's estimates",
        "labels": "measure label switching over the checkpoints of a run",
        "audit": "check that a run consumed every position exactly once",
    },
    "use a model": {
        "separate": "separate recordings into one file per speaker",
        "import": "turn a checkpoint of Asteroid, SpeechBrain or torchaudio into a model of ours",
        "export": "write a separator as one file for torch.export or ONNX",
        "push": "put a model, with a model card, on the Hugging Face hub or into a folder",
    },
    "look": {
        "plot": "draw the papers' figures from runs",
        "completion": "print a script that lets bash, zsh or fish complete commands",
    },
}
VERBS = {verb: summary for verbs in PURPOSES.values() for verb, summary in verbs.items()}


def main() -> None:
    """Run the verb that the command line names; exit status 2 where it names none.

    SIGTERM and SIGHUP end it as Ctrl-C does, so that nothing half-written remains.
    """
    sys.unraisablehook = _send_again
    try:
        try:
            status = run(sys.argv[1] if len(sys.argv) > 1 else "")
        finally:
            print(end="", flush=True)  # here a closed pipe or a full disk can still be caught
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # the reader, such as `head`, has seen enough
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        status = 1
    except (KeyboardInterrupt, Exception) as error:  # before the verb's own console
        from sepdist.console import stop_behind  # late: rich would make TAB slow

        if (stop := stop_behind(error)) is None:
            raise
        print("stopped", file=sys.stderr)
        status = 128 + getattr(stop, "number", signal.SIGINT)
    _signals_to(signal.SIG_DFL)  # else a callback at exit would show a traceback
    sys.exit(status)


def _signals_to(handler: Callable[[int, object], None] | signal.Handlers) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, handler)


def _end(number: int, frame: object) -> None:
    """Nothing is half-written amid imports, and not every compiled module bears an exception."""
    os.write(2, b"stopped\n")
    os._exit(128 + number)


def _send_again(unraisable: Any) -> None:
    """Send a signal again that came in a callback or a destructor, where Python drops it."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        return sys.__unraisablehook__(unraisable)
    number = getattr(unraisable.exc_value, "number", signal.SIGINT)
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _stop(number: int, frame: object) -> None:
    raise type("Stopped", (KeyboardInterrupt,), {"number": number})  # console's may not be imported


def run(verb: str) -> int | None:
    """Run one verb; returns its exit status, None for success."""
    if verb in VERBS:
        os.environ["MPLBACKEND"] = "Agg"  # figures go to files; a notebook's may not be installed
        sys.argv = [f"sepdist {verb}", *sys.argv[2:]]
        _signals_to(_end)
        program = importlib.import_module(f"sepdist.cli.{verb}")
        _signals_to(_stop)
        return program.main()
    width, wanted = max(map(len, VERBS)), verb in ("-h", "--help")
    lines = [f"error: no verb {verb!r}", ""] if verb and not wanted else []
    lines += ["usage: sepdist VERB ..."]
    for purpose, verbs in PURPOSES.items():
        lines += ["", f"{purpose}:", *(f"  {name:{width}}  {verbs[name]}" for name in verbs)]
    lines += ["", "sepdist VERB --help explains one."]
    print("\n".join(lines), file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2
