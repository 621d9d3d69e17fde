"""The schema of a pipeline: its stages and its tables."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from omegaconf import MISSING

from sepdist.config import SEEDS, number


@dataclass
class StageConfig:
    """One stage of a pipeline; its folder is output/seed-<seed>/<its name>."""

    kind: str = "train"  # or shards, evaluate, estimate, recognise, labels, figure
    uses: list[str] = field(default_factory=list)  # earlier stages: weights, model or runs to draw
    overrides: list[str] = field(default_factory=list)  # key=value; @stage means a stage's folder
    title: str = ""  # legend in a figure, or title of the figure
    experiment: str = ""  # train: a file of configs/experiment
    settings: list[str] = field(default_factory=list)  # train: key=value that adapt the experiment


@dataclass
class RowConfig:
    """One row of a table."""

    title: str = MISSING
    cells: list[str] = field(default_factory=list)  # STAGE:a.b of its results.json, or "-"
    paper: list[Any] = field(default_factory=list)  # the paper's numbers; null where it has none


@dataclass
class TableConfig:
    """One table of a pipeline."""

    title: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[RowConfig] = field(default_factory=list)
    digits: int = number(2, 0, 17)


@dataclass
class PipelineConfig:
    """`configs/pipeline.yaml`: sepdist pipeline."""

    path_arguments: ClassVar = ("output", "data_root")
    name: str = MISSING
    title: str = ""
    output: str = MISSING  # folder or s3:// prefix
    data_root: str = "data"  # folder or s3:// prefix of the data sets that the experiments name
    test_data: str = ""  # data set of evaluations, unless their overrides name another
    vars: dict[str, Any] = field(default_factory=dict)  # values that stages refer to as ${vars.x}
    results: str = "table"  # name of the result files, for pipelines that share an output
    scale: str = ""  # a file of configs/scale, for all training stages
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"range": SEEDS})
    stages: dict[str, StageConfig] = field(default_factory=dict)  # in the order in which they run
    overrides: dict[str, list[str]] = field(default_factory=dict)  # key=value for a kind of stages
    tables: list[TableConfig] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)  # packages with models, corpora, ... to use


@dataclass
class FigureConfig:
    """The keys of sepdist plot and of a stage of kind figure."""

    path_arguments: ClassVar = ("output",)
    runs: dict[str, str] = field(default_factory=dict)  # runs.TITLE=FOLDER: what to draw, in order
    output: str = MISSING  # the PNG file, local or s3://
    title: str = ""  # of the figure
    kind: str = "figure2"  # or gap, histogram, scatter


@dataclass(frozen=True)
class Stage:
    """One stage of one seed, ready to run."""

    seed: int
    name: str
    kind: str
    folder: str
    config: Any  # the whole config of its program
