"""Tables 1 to 4 and figures 3 and 4 of paper 2 (Dang et al. 2023) as pipelines.

    sepdist pipeline experiment=dang2023/table1 data_root=data output=runs/dang2023 scale=mini

Each function listed in PIPELINES returns the stages and tables of one pipeline. They share the name
`dang2023`, so with one output a stage that one of them has finished is not run again by another. In
overrides, @stage means the folder of a stage. `mini` is the scale of two CPU cores: fewer SI-SNR
estimators, all with the encoder that vars.ssqp and vars.pretrained choose. The paper's numbers and
settings are in dang2023.yaml.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from sepdist.papers.schema import PipelineConfig, RowConfig, StageConfig, TableConfig

Stages = dict[str, StageConfig]
Numbers = Sequence[float | None]

SEPARATORS = ("sf", "dr", "ctn")  # SepFormer, DPRNN, Conv-TasNet
ESTIMATORS = {"realm": "CNN [11]", "ssqp": "SSQP-Net"}
SI_SNRI = "metrics_db.si_snri.mean"
PAPER = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())


def figure3(mini: bool) -> PipelineConfig:
    """Three separators, their estimates of train-100, dev and test, and the SI-SNR of these."""
    stages = separators(SEPARATORS, mini)
    uses = [f"{name}_train" for name in SEPARATORS]
    stages["figure3"] = figure("Training sets", uses, "histogram")
    return pipeline("figure3", "Figure 3, SI-SNR of the separators' estimates", stages, [], mini)


def table1(mini: bool) -> PipelineConfig:
    """Correlation of predicted and true SI-SNR, by encoder and by the separators' estimates."""
    stages, rows, titles = figure3(mini).stages, PAPER["table1_mini" if mini else "table1"], {}
    for name in rows:
        stages |= scored(name, estimator(name, mini))
        kind, separator, *encoder = name.split("_")
        titles[name] = ", ".join((ESTIMATORS[kind], separator.upper(), *encoder))
    tables = [estimator_table("Table 1, LCC", "lcc", rows, titles)]
    if mini:
        tables.append(estimator_table("The same, MAE in dB", "mae", rows, titles))
    title = "Table 1, correlation with the true SI-SNR"
    return pipeline("table1", title, stages, tables, mini)


def table2(mini: bool) -> PipelineConfig:
    """Error of SSQP-Net, all estimates of a mixture at once (OTFP) or each alone (OTFS)."""
    stages, rows, titles = figure3(mini).stages, PAPER["table2_mini" if mini else "table2"], {}
    for name in rows:
        mode = "otfs" if name.endswith("_otfs") else "otfp"
        stages |= scored(name, estimator(name.removesuffix("_otfs"), mini, mode))
        titles[name] = f"{mode.upper()}, {name.split('_')[1].upper()}"
    tables = [estimator_table("Table 2, MAE in dB", "mae", rows, titles)]
    return pipeline("table2", "Table 2, error of OTFP and OTFS", stages, tables, mini)


def figure4(mini: bool) -> PipelineConfig:
    """Predicted over true SI-SNR of the baseline and of SSQP-Net, on DR's estimates of test."""
    stages = figure3(mini).stages
    names = ("realm_dr", "ssqp_dr") if mini else ("realm_sf", "ssqp_dr_wav2vec2")
    stages |= {name: estimator(name, mini) for name in names}
    for name in names:
        kind, separator, *_ = name.split("_")
        title = f"{ESTIMATORS[kind]} ({separator.upper()})"
        stages[f"{name}_on_dr"] = estimate(name, "dr", title)
    stages["figure4"] = figure("", [f"{name}_on_dr" for name in names], "scatter")
    return pipeline("figure4", "Figure 4, predicted over true SI-SNR", stages, [], mini)


def chain(mini: bool) -> PipelineConfig:
    """The whole chain: DR, its estimates, SSQP-Net, SSLM-SS with 10 % labelled beside CTN."""
    stages = separators(["dr"], mini) | {"ssqp_dr": estimator("ssqp_dr", mini)}
    stages["ssqp_dr_on_dr"] = estimate("ssqp_dr", "dr")
    stages |= {"labelled_10": subset(0, 10, mini), "unlabelled_90": subset(10, 100, mini)}
    stages |= trained_and_tested(("ctn_10", "sslm_10"), mini)
    stages["gap_10"] = figure("Predicted and true SI-SNR", ["sslm_10"], "gap")
    rows = [RowConfig("CTN", [f"ctn_10_test:{SI_SNRI}"], [8.8])]
    rows += [RowConfig("SSLM-SS", [f"sslm_10_test:{SI_SNRI}"], [11.7])]
    tables = [TableConfig("SI-SNRi in dB, 10 % labelled", ["SI-SNRi"], rows)]
    cells = ["ssqp_dr_on_dr:lcc", "ssqp_dr_on_dr:mae"]
    rows = [RowConfig("SSQP-Net, OTFP", cells, [0.90, 1.39])]
    title = "SSQP-Net on DR's estimates of the test set"
    tables += [TableConfig(title, ["LCC", "MAE in dB"], rows)]
    return pipeline("chain", "From separators to SSLM-SS", stages, tables, mini)


def table3(mini: bool) -> PipelineConfig:
    """CTN, MixIT and SSLM-SS with 10, 50 and 100 % labelled; begins with the chain."""
    stages = chain(mini).stages
    stages |= {"labelled_50": subset(0, 50, mini), "labelled_100": subset(0, 100, mini)}
    stages |= {"unlabelled_50": subset(50, 100, mini)}
    stages |= trained_and_tested(("ctn_100", "ctn_50", "mixit_50", "mixit_10", "sslm_50"), mini)
    runs = ["ctn_100", "ctn_50", "ctn_10", "mixit_50", "mixit_10", "sslm_50", "sslm_10"]
    stages["curves"] = figure("Table 3", runs)
    stages["gap"] = figure("Predicted and true SI-SNR", ["sslm_50", "sslm_10"], "gap")
    rows = []
    for method, row in PAPER["table3"].items():
        tests = [f"{method}_{percent}_test" for percent in (10, 50, 100)]
        cells = [f"{test}:{SI_SNRI}" if test in stages else "-" for test in tests]
        rows.append(RowConfig(row["title"], cells, row["paper"]))
    tables = [TableConfig("Table 3, SI-SNRi in dB", ["10 %", "50 %", "100 %"], rows)]
    return pipeline("table3", "Table 3, SI-SNRi with less labelled data", stages, tables, mini)


def table4(mini: bool) -> PipelineConfig:
    """Word error rates on LibriCSS of mixtures, CTN and SSLM-SS; begins with table 3.

    At scale mini: Whisper on mixtures of vars.speech, a tree of LibriSpeech's shape.
    """
    stages = table3(mini).stages
    stages |= {f"{name}_wer": StageConfig("recognise", [name]) for name in PAPER["table4"]}

    def cells(name: str, what: str) -> list[str]:
        return [f"{name}_wer:wer.OV{share}.{what}" for share in (10, 20, 30, 40)]

    rows = [RowConfig("Mixture", cells("ctn_100", "mixture"), [9.2, 15.3, 24.4, 32.5])]
    for name, paper in PAPER["table4"].items():
        rows.append(RowConfig(stages[name].title, cells(name, "separated"), paper))
    tables = [TableConfig("Table 4, WER in %", ["10", "20", "30", "40"], rows, digits=1)]
    cfg = pipeline("table4", "Table 4, word error rates on LibriCSS", stages, tables, mini)
    cfg.vars |= {"recogniser": "whisper-base" if mini else "facebook/wav2vec2-base-960h"}
    cfg.vars |= {"speech": "speech"} if mini else {"libricss": "libricss/for_release"}
    chosen = "corpus=libricss corpus.root=${vars.libricss}"
    if mini:
        chosen = "corpus=overlap corpus.root=${vars.speech} corpus.num_mixtures=30"
        chosen += " recogniser=faster_whisper"
    chosen += " recogniser.folder=${vars.recogniser}"
    cfg.overrides["recognise"] = [*cfg.overrides["evaluate"], *chosen.split()]
    return cfg


def separators(names: Iterable[str], mini: bool) -> Stages:
    """Separators, and data sets with their estimates of the train, dev and test mixtures."""
    data = {"train": "corpus.data=${vars.estimator_data} subset=${vars.estimator_subset}"}
    data |= {"dev": "corpus.data=${vars.dev}", "test": "corpus.data=${vars.test}"}
    device = "corpus.device=${vars.device} gpus_per_worker=${vars.gpus}"
    stages = {name: train(name, mini) for name in names}
    for name in names:
        for split, source in data.items():
            chosen = f"corpus=separated corpus.noise=false corpus.model=@{name} {device} {source}"
            stages[f"{name}_{split}"] = StageConfig("shards", [], chosen.split(), name.upper())
    return stages


def estimator(name: str, mini: bool, mode: str = "${vars.mode}") -> StageConfig:
    """Train an SI-SNR estimator, realm_SEPARATOR or ssqp_SEPARATOR[_ENCODER], on estimates."""
    kind, separator, *encoder = name.split("_")
    if kind == "realm":  # of REAL-M (Subakan et al. 2022), on SI-SNR clipped to 0 to 10 dB
        settings = "model=sisnr_cnn objective.limits=[0.0,10.0]"
        hold = "schedule.hold_steps=43450"  # 25 epochs
        settings += "" if mini else f" schedule.warmup_steps=0 schedule.patience=2 {hold}"
    elif encoder:
        settings = f"model=ssqp_wav2vec2 model.pretrained={PAPER['encoders'][encoder[0]]}"
        settings += f" model.encoder.model_type={encoder[0]}"
    else:
        settings = "model=${vars.ssqp} model.pretrained=${vars.pretrained}"
        settings += " model.num_layers=${vars.num_layers}"
    data = f"data.train=@{separator}_train data.validation=@{separator}_dev"
    stage = train("ssqp", mini, settings, data)
    if kind == "realm":  # 250, or 200 epochs of 13900 / 8 = 1738
        stage.settings.append(f"training.max_steps={250 if mini else 347600}")
    else:
        stage.settings.append(f"model.mode={mode}")
    return stage


def estimate(name: str, separator: str, title: str = "") -> StageConfig:
    """Score an estimator on a separator's estimates of the test set."""
    return StageConfig("estimate", [name], [f"data=@{separator}_test"], title)


def scored(name: str, stage: StageConfig) -> Stages:
    """An estimator and its scores on the estimates of every separator."""
    return {name: stage} | {f"{name}_on_{one}": estimate(name, one) for one in SEPARATORS}


def estimator_table(
    title: str, metric: str, rows: Mapping[str, Numbers], titles: Mapping[str, str]
) -> TableConfig:
    """A table with a row for each estimator and a column for each separator."""
    cells = {name: [f"{name}_on_{one}:{metric}" for one in SEPARATORS] for name in rows}
    made = [RowConfig(titles[name], cells[name], list(paper)) for name, paper in rows.items()]
    return TableConfig(title, [name.upper() for name in SEPARATORS], made)


def figure(title: str, uses: list[str], kind: str = "figure2") -> StageConfig:
    """Draw earlier stages."""
    return StageConfig("figure", uses, [f"kind={kind}"], title)


def subset(first: int, last: int, mini: bool) -> StageConfig:
    """A data set of the mixtures between two percentages; those from 0 up are labelled."""
    share = [one / 100 if mini else PAPER["labelled"][one] for one in (first, last)]
    chosen = "corpus=stored corpus.noise=false corpus.data=${vars.mixtures}"
    chosen += f" subset=[{share[0]},{share[1]}] mixtures_only={str(first > 0).lower()}"
    return StageConfig("shards", [], chosen.split())


def trained_and_tested(runs: Iterable[str], mini: bool) -> Stages:
    """Runs METHOD_PERCENT and their tests: ctn learns from labelled mixtures, others from all."""
    stages = {}
    for run in runs:
        method, percent = run.split("_")
        data, rest = f"data.train=@labelled_{percent}", f"@unlabelled_{100 - int(percent)}"
        if method != "ctn":
            data += f" data.extra=[{{name:unlabelled,url:'{rest}',weight:1.0}}]"
        if method == "sslm":
            data += " objective.estimator.url=@ssqp_dr"
        stages[run] = train("ctn_subset" if method == "ctn" else method, mini, "", data)
        stages[run].title = f"{PAPER['table3'][method]['title']} ({percent} %)"
    return stages | {f"{run}_test": StageConfig("evaluate", [run]) for run in runs}


def train(experiment: str, mini: bool, settings: str = "", data: str = "") -> StageConfig:
    """Train an experiment, at scale mini with fewer steps."""
    if mini:
        steps = PAPER["mini_steps"].get(experiment, 500)
        settings += f" {PAPER['mini'].get(experiment, '')} training.max_steps={steps}"
    name = f"dang2023/{experiment}"
    return StageConfig("train", [], data.split(), "", name, settings.split())


def pipeline(
    results: str, title: str, stages: Stages, tables: list[TableConfig], mini: bool
) -> PipelineConfig:
    """A pipeline with the data sets, devices and workers of its scale."""
    workers = ["num_workers=2"] if mini else ["num_workers=8", "use_gpu=true"]
    shards = ["num_workers=2", "samples_per_shard=50"] if mini else ["num_workers=8"]
    return PipelineConfig(
        name="dang2023-mini" if mini else "dang2023",
        title=title,
        test_data="${vars.test}",
        vars=PAPER["vars"] | (PAPER["vars_mini"] if mini else {}),
        results=results,
        stages=stages,
        overrides={"shards": shards, "evaluate": workers, "estimate": workers},
        tables=tables,
    )


PIPELINES = (figure3, table1, table2, figure4, chain, table3, table4)
