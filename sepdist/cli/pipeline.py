"""Run several stages in order, such as those of a paper's table.

    sepdist pipeline experiment=huang2021/table2_libri2mix data_root=s3://bucket/data seeds=[0,1]
    sepdist pipeline experiment=huang2021/table2_libri2mix data_root=data scale=mini
    ray job submit --working-dir . -- sepdist pipeline experiment=huang2021/table2_libri2mix ...

The papers' pipelines are functions of sepdist/papers/; others are YAML files in the folder
experiment/ of --config-dir.
"""

import sys

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from sepdist import config, papers
from sepdist.console import user_console
from sepdist.papers.schema import PipelineConfig

config.register_schemas()


def main() -> None:
    """Compose and run the pipeline; exit with status 1 and one line for an error of the user."""
    given = dict(one.split("=", 1) for one in sys.argv[1:] if "=" in one)
    # Hydra must not see scale=...: it would take it as a choice in configs/scale, a group of
    # `sepdist train`. Here the scale decides which stages a paper's pipeline has.
    sys.argv = [one for one in sys.argv if not one.startswith("scale=")]
    papers.register(given.get("experiment", ""), given.get("scale", ""))
    compose_and_run()


@hydra.main(version_base="1.3", config_path=config.config_dir(), config_name="pipeline")
def compose_and_run(composed: DictConfig) -> None:
    """Run the pipeline that Hydra has composed."""
    from sepdist.papers.pipeline import run
    from sepdist.training.launch import TrainingFailedError

    GlobalHydra.instance().clear()  # each stage is composed by Hydra too
    with user_console(TrainingFailedError, stopped="the same command goes on") as console:
        run(config.typed(composed, PipelineConfig), console)


if __name__ == "__main__":
    main()
