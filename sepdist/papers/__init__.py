"""The experiments of two papers as pipelines of stages, with their tables and figures."""

import dataclasses

from sepdist.papers import dang2023, huang2021

PIPELINES = {
    f"{paper.__name__.rpartition('.')[2]}/{pipeline.__name__}": pipeline
    for paper in (huang2021, dang2023)
    for pipeline in paper.PIPELINES
}


def register(experiment: str = "", scale: str = "") -> None:
    """Give Hydra `experiment`, if it is one of the papers' pipelines.

    Only that one, because Hydra copies all that it was given whenever it composes a stage. `scale`
    is "mini", or "" for the papers' own.
    """
    from hydra.core.config_store import ConfigStore

    if experiment in PIPELINES:
        node = dataclasses.asdict(PIPELINES[experiment](scale == "mini"))
        for key in ("output", "data_root", "seeds", "scale"):  # the user's, not the paper's
            del node[key]
        group, _, name = f"experiment/{experiment}".rpartition("/")
        ConfigStore.instance().store(name, node, group=group, package="_global_")
