"""Run several stages in order, such as those of a paper's table.

    sepdist pipeline experiment=huang2021/table2_libri2mix data_root=s3://bucket/data seeds=[0,1]
    sepdist pipeline experiment=huang2021/table2_libri2mix data_root=data scale=mini \\
        "overrides.train=['cluster.num_workers=1']"
    sepdist pipeline --config-dir mine experiment=chain
    ray job submit --working-dir . -- sepdist pipeline experiment=huang2021/table2_libri2mix ...

The papers' pipelines are functions of sepdist/papers/; your own are YAML files with `stages` in
experiment/ of --config-dir, where the stages find their experiments and models too. Started again
with the same config, a pipeline resumes where it was stopped.
"""

import sys

from sepdist import papers
from sepdist.cli.compose import read_config
from sepdist.console import user_console
from sepdist.papers.schema import PipelineConfig


def main() -> None:
    """Compose and run the pipeline; exit with status 1 and one line for an error of the user."""
    given = dict(one.split("=", 1) for one in sys.argv[1:] if "=" in one)
    papers.register(given.get("experiment", ""), given.get("scale", ""))
    with user_console():
        cfg = read_config("pipeline", PipelineConfig, __doc__)
    from sepdist.papers.pipeline import run
    from sepdist.training.launch import TrainingFailedError

    with user_console(TrainingFailedError, stopped="the same command goes on") as console:
        run(cfg, console)
