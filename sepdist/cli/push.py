"""Give a model away, with a model card made from its lineage and scores.

    sepdist push runs/a hf://org/name --licence cc-by-4.0 --results evaluation/results.json
    sepdist push runs/a shared/name --licence cc-by-4.0 --half

The target gets model.yaml, model.safetensors, lineage.json (without paths of this machine) and
README.md. A folder or s3:// prefix must be empty. On the hub the repository is created if need be;
one that holds files gets a new commit only with --update. The token is that of `hf auth login` or
HF_TOKEN. Anyone, on any machine, then names the model hf://org/name.
"""

import argparse

from sepdist.console import user_console


def main() -> None:
    """Push one model."""
    given = _parser().parse_args()
    with user_console():
        from sepdist.inference.pushing import push

        print(push(**vars(given)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="run_dir (its best checkpoint is taken) or export")
    parser.add_argument("target", help="hf://org/name, or a new folder or s3:// prefix")
    licence = "as the hub calls it: mit, apache-2.0, cc-by-4.0, ...; the data's may bind you"
    parser.add_argument("--licence", required=True, help=licence)
    parser.add_argument("--results", default="", help="results.json of `sepdist evaluate`")
    parser.add_argument("--half", action="store_true", help="round the weights to float16")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--update", action="store_true", help="add a commit to a repository")
    return parser
