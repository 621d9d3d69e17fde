"""Several stages in order, each handing its weights to the next: one config in; runs, scores, a table and figures out.

    python -m sepdist pipeline experiment=huang2021/table2_libri2mix data_root=s3://bucket/data seeds=[0,1]
    ray job submit --working-dir . -- python -m sepdist pipeline experiment=huang2021/table2_libri2mix ...

    output/pipeline.yaml               what was asked for last
    output/seed-0/<stage>/             run_dir of a `train` stage, data set of a `shards` stage, output of another kind
    output/seed-0/<stage>/stage.json   its whole config, put when it has finished; such a stage is not run again
    output/table.md, table.json        the paper's numbers beside ours (or another name, by results=...)

A `train` stage is an experiment of configs/experiment with changes. In changes, @stage means the folder of an earlier
stage: `data.train=@separated`. All stages are composed before the first one runs, so that a mistake in the last one
costs nothing. Stopped and started again, training goes on from its checkpoint.
"""

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from sepdist import config
from sepdist.config import (
    PipelineConfig,
)
from sepdist.console import user_console
from sepdist.papers.pipeline import run

config.register_schemas()


@hydra.main(version_base="1.3", config_path=config.config_dir(), config_name="pipeline")
def main(composed: DictConfig) -> None:
    """Compose, run, print the table; errors of the user are one line and exit status 1."""
    from sepdist.training.launch import TrainingFailedError

    GlobalHydra.instance().clear()  # the stages are composed anew
    with user_console(TrainingFailedError, stopped="the same command goes on") as console:
        run(config.typed(composed, PipelineConfig), console)


if __name__ == "__main__":
    main()
