"""The programs, one module per verb: `sepdist VERB ...`, or `python -m sepdist VERB ...`."""

import importlib
import os
import sys

VERBS = {
    "shard": "cut a corpus into shards (write), check a data set (verify) or describe it (info)",
    "train": "train one stage in Ray Train workers",
    "pipeline": "run the stages of an experiment in order and write its tables",
    "evaluate": "score a separator on a test set: SI-SNR and SDR",
    "estimate": "score an SI-SNR estimator against the true SI-SNR",
    "recognise": "measure word error rates of mixtures and of a separator's estimates",
    "separate": "separate recordings into one file per speaker",
    "labels": "measure label switching over the checkpoints of a run",
    "plot": "draw the papers' figures from runs",
    "audit": "check that a run consumed every position exactly once",
}


def main() -> None:
    """Run the verb that the command line names; exit status 2 where it names none."""
    try:
        try:
            status = run(sys.argv[1] if len(sys.argv) > 1 else "")
        finally:
            sys.stdout.flush()  # here a closed pipe can still be caught
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
        status = 1
    sys.exit(status)


def run(verb: str) -> int | None:
    """Run one verb; returns its exit status, None for success."""
    if verb in VERBS:
        sys.argv = [f"sepdist {verb}", *sys.argv[2:]]
        return importlib.import_module(f"sepdist.cli.{verb}").main()
    width = max(map(len, VERBS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in VERBS.items()]
    wanted = verb in ("-h", "--help")
    if verb and not wanted:
        print(f"error: no verb {verb!r}", file=sys.stderr)
    usage = ["usage: sepdist VERB ...", "", *lines, "", "sepdist VERB --help explains one."]
    print("\n".join(usage), file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2
