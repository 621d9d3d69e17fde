"""The programs, one module per verb: `sepdist VERB ...`, or `python -m sepdist VERB ...`."""

import importlib
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
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb not in VERBS:
        width = max(map(len, VERBS))
        lines = [f"  {name:{width}}  {summary}" for name, summary in VERBS.items()]
        usage = "\n".join(
            ["usage: sepdist VERB ...", "", *lines, "", "sepdist VERB --help explains one."]
        )
        wanted = verb in ("-h", "--help")
        print(usage, file=sys.stdout if wanted else sys.stderr)
        sys.exit(0 if wanted else 2)
    sys.argv = [f"sepdist {verb}", *sys.argv[2:]]
    sys.exit(importlib.import_module(f"sepdist.cli.{verb}").main())
