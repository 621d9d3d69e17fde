"""The experiments of two papers as pipelines of stages, with their tables and figures."""

import dataclasses

from hydra.core.config_store import ConfigStore

from sepdist.papers import dang2023, huang2021
from sepdist.papers.schema import PipelineConfig


def register(scale: str = "") -> None:
    """Give Hydra the schema of pipelines and, as options of experiment=, the papers' pipelines.

    The options depend on `scale` ("mini" or the papers' own).
    """
    store = ConfigStore.instance()
    store.store("pipeline_schema", PipelineConfig)
    for paper in (dang2023, huang2021):
        group = f"experiment/{paper.__name__.rpartition('.')[2]}"
        for pipeline in paper.PIPELINES:
            node = dataclasses.asdict(pipeline(scale == "mini"))
            for key in ("output", "data_root", "seeds"):  # not the paper's to say
                del node[key]
            store.store(pipeline.__name__, node, group=group, package="_global_")
