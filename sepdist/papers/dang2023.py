"""Tables 1 to 4 and figures 3 and 4 of paper 2 (Dang et al. 2023) as pipelines.

    sepdist pipeline experiment=dang2023/table1 data_root=data output=runs/dang2023 scale=mini

Each function listed in PIPELINES returns the stages and tables of one pipeline. They share the name
`dang2023`, so with one output a stage that one of them has finished is not run again by another. In
overrides, @stage means the folder of a stage. `mini` is the scale of two CPU cores: fewer SI-SNR
estimators, all with the encoder that vars.ssqp and vars.pretrained choose.
"""

from collections.abc import Iterable, Mapping, Sequence

from sepdist.papers.schema import PipelineConfig, RowConfig, StageConfig, TableConfig

Stages = dict[str, StageConfig]
Numbers = Sequence[float | None]

SEPARATORS = ("sf", "dr", "ctn")  # SepFormer, DPRNN, Conv-TasNet
ENCODERS = {
    "wav2vec2": "facebook/wav2vec2-base",
    "hubert": "facebook/hubert-base-ls960",
    "wavlm": "microsoft/wavlm-base",
}
SI_SNRI = "metrics_db.si_snri.mean"
MINI_STEPS = {"sf": 375, "ssqp": 375}  # the others: 500
MINI = {
    # 500 steps x 16 / 150: f(t) rises to 0.5 in the end, as in the paper's 150 epochs.
    "sslm": ["objective.epoch_samples=53", "validation.max_seconds=4.0"],
    "ssqp": ["data.micro_batch=2", "validation.max_seconds=4.0", "optim.lr=0.0002"],
}

VARS = {
    "estimator_data": "${data_root}/libri2mix/train-100",  # on its estimates estimators train
    "estimator_subset": [0.0, 1.0],  # of it
    "dev": "${data_root}/libri2mix/dev",
    "test": "${data_root}/libri2mix/test",
    "mixtures": "${data_root}/libri2mix/train-360",  # for SSLM-SS
    "device": "cuda",  # of the separators that write estimates
    "gpus": 1,
    "ssqp": "ssqp_wav2vec2",  # encoder: a model, its `pretrained`, layers (null: all), otfp or otfs
    "pretrained": ENCODERS["wav2vec2"],
    "num_layers": "null",
    "mode": "otfp",
}
VARS_MINI = VARS | {
    **{name: "${data_root}/sep-train" for name in ("estimator_data", "mixtures")},
    **{name: f"${{data_root}}/{name}" for name in ("dev", "test")},
    **{"estimator_subset": [0.0, 0.3], "device": "cpu", "gpus": 0, "pretrained": "null"},
}


def figure3(mini: bool) -> PipelineConfig:
    """Three separators, their estimates of train-100, dev and test, and the SI-SNR of these."""
    stages = separators(SEPARATORS, mini)
    training_sets = [f"{name}_train" for name in SEPARATORS]
    stages["figure3"] = figure("Training sets", training_sets, "histogram")
    return pipeline("figure3", "Figure 3, SI-SNR of the separators' estimates", stages, [], mini)


TABLE1: dict[str, Numbers] = {  # LCC on the estimates of SF, DR and CTN
    "realm_sf": [0.80, 0.80, 0.81],
    "ssqp_sf_wav2vec2": [0.87, 0.89, 0.85],
    "ssqp_sf_hubert": [0.85, 0.86, 0.82],
    "ssqp_sf_wavlm": [0.87, 0.90, 0.86],
    "ssqp_dr_wav2vec2": [0.86, 0.90, 0.87],
    "ssqp_dr_hubert": [0.84, 0.89, 0.84],
    "ssqp_dr_wavlm": [0.86, 0.90, 0.87],
    "ssqp_ctn_wav2vec2": [0.85, 0.89, 0.88],
    "ssqp_ctn_hubert": [0.84, 0.89, 0.89],
    "ssqp_ctn_wavlm": [0.86, 0.90, 0.89],
}
TABLE1_MINI: dict[str, Numbers] = {"realm_dr": (), "ssqp_dr": (), "realm_ctn": (), "ssqp_ctn": ()}


def table1(mini: bool) -> PipelineConfig:
    """Correlation of predicted and true SI-SNR, by encoder and by the separators' estimates."""
    stages, rows, titles = figure3(mini).stages, TABLE1_MINI if mini else TABLE1, {}
    for name in rows:
        stages |= scored(name, estimator(name, mini))
        kind, separator, *encoder = name.split("_")
        titles[name] = ", ".join((ESTIMATORS[kind], separator.upper(), *encoder))
    tables = [estimator_table("Table 1, LCC", "lcc", rows, titles)]
    if mini:
        tables.append(estimator_table("The same, MAE in dB", "mae", rows, titles))
    title = "Table 1, correlation with the true SI-SNR"
    return pipeline("table1", title, stages, tables, mini)


TABLE2: dict[str, Numbers] = {  # MAE in dB on the estimates of SF, DR and CTN
    "ssqp_sf_wav2vec2": [1.39, 2.02, 1.77],
    "ssqp_dr_wav2vec2": [1.28, 1.39, 1.33],
    "ssqp_ctn_wav2vec2": [1.59, 1.28, 1.20],
    "ssqp_sf_wav2vec2_otfs": [1.30, 2.00, 1.57],
    "ssqp_dr_wav2vec2_otfs": [1.36, 1.31, 1.29],
    "ssqp_ctn_wav2vec2_otfs": [1.49, 1.62, 1.20],
}
TABLE2_MINI: dict[str, Numbers] = {"ssqp_dr": (), "ssqp_dr_otfs": ()}


def table2(mini: bool) -> PipelineConfig:
    """Error of SSQP-Net, all estimates of a mixture at once (OTFP) or each alone (OTFS)."""
    stages, rows, titles = figure3(mini).stages, TABLE2_MINI if mini else TABLE2, {}
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


TABLE3: dict[str, tuple[str, Numbers]] = {  # SI-SNRi in dB with 10, 50 and 100 % labelled
    "ctn": ("CTN", [8.8, 11.6, 13.0]),
    "mixit": ("MixIT", [11.5, 11.8, None]),
    "sslm": ("SSLM-SS", [11.7, 12.9, None]),
}


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
    for method, (title, paper) in TABLE3.items():
        tests = [f"{method}_{percent}_test" for percent in (10, 50, 100)]
        cells = [f"{test}:{SI_SNRI}" if test in stages else "-" for test in tests]
        rows.append(RowConfig(title, cells, list(paper)))
    tables = [TableConfig("Table 3, SI-SNRi in dB", ["10 %", "50 %", "100 %"], rows)]
    return pipeline("table3", "Table 3, SI-SNRi with less labelled data", stages, tables, mini)


TABLE4 = {  # WER in % with 10, 20, 30 and 40 % overlap
    "ctn_100": [9.4, 12.5, 18.1, 21.3],
    "ctn_50": [11.3, 14.9, 20.4, 25.0],
    "sslm_50": [11.2, 14.5, 20.1, 23.2],
    "ctn_10": [12.7, 16.8, 24.1, 28.5],
    "sslm_10": [12.1, 15.6, 21.1, 25.7],
}


def table4(mini: bool) -> PipelineConfig:
    """Word error rates on LibriCSS of mixtures, CTN and SSLM-SS; begins with table 3.

    At scale mini: Whisper on mixtures of vars.speech, a tree of LibriSpeech's shape.
    """
    stages = table3(mini).stages
    stages |= {f"{name}_wer": StageConfig("recognise", [name]) for name in TABLE4}

    def cells(name: str, what: str) -> list[str]:
        return [f"{name}_wer:wer.OV{share}.{what}" for share in (10, 20, 30, 40)]

    rows = [RowConfig("Mixture", cells("ctn_100", "mixture"), [9.2, 15.3, 24.4, 32.5])]
    rows += [RowConfig(stages[one].title, cells(one, "separated"), TABLE4[one]) for one in TABLE4]
    tables = [TableConfig("Table 4, WER in %", ["10", "20", "30", "40"], rows, digits=1)]
    cfg = pipeline("table4", "Table 4, word error rates on LibriCSS", stages, tables, mini)
    if mini:
        cfg.vars |= {"speech": "speech", "recogniser": "whisper-base"}
        corpus = ["corpus=overlap", "corpus.root=${vars.speech}", "corpus.num_mixtures=30"]
        chosen = [*corpus, "recogniser=faster_whisper"]
    else:
        recogniser = "facebook/wav2vec2-base-960h"
        cfg.vars |= {"libricss": "libricss/for_release", "recogniser": recogniser}
        chosen = ["corpus=libricss", "corpus.root=${vars.libricss}"]
    chosen.append("recogniser.folder=${vars.recogniser}")
    cfg.overrides["recognise"] = [*cfg.overrides["evaluate"], *chosen]
    return cfg


def separators(names: Iterable[str], mini: bool) -> Stages:
    """Separators, and data sets with their estimates of the train, dev and test mixtures."""
    data = {"train": ["corpus.data=${vars.estimator_data}", "subset=${vars.estimator_subset}"]}
    data |= {"dev": ["corpus.data=${vars.dev}"], "test": ["corpus.data=${vars.test}"]}
    device = ["corpus.device=${vars.device}", "gpus_per_worker=${vars.gpus}"]
    stages = {name: train(name, mini) for name in names}
    for name in names:
        chosen = ["corpus=separated", "corpus.noise=false", f"corpus.model=@{name}", *device]
        for split, source in data.items():
            overrides = [*chosen, *source]
            stages[f"{name}_{split}"] = StageConfig("shards", [], overrides, name.upper())
    return stages


ESTIMATORS = {"realm": "CNN [11]", "ssqp": "SSQP-Net"}


def estimator(name: str, mini: bool, mode: str = "${vars.mode}") -> StageConfig:
    """Train an SI-SNR estimator, realm_SEPARATOR or ssqp_SEPARATOR[_ENCODER], on estimates."""
    kind, separator, *encoder = name.split("_")
    if kind == "realm":  # of REAL-M (Subakan et al. 2022), on SI-SNR clipped to 0 to 10 dB
        settings = ["model=sisnr_cnn", "objective.limits=[0.0,10.0]"]
        hold = ["schedule.hold_steps=43450"]  # 25 epochs
        settings += [] if mini else ["schedule.warmup_steps=0", "schedule.patience=2", *hold]
    elif encoder:
        settings = ["model=ssqp_wav2vec2", f"model.pretrained={ENCODERS[encoder[0]]}"]
        settings += [f"model.encoder.model_type={encoder[0]}"]
    else:
        settings = ["model=${vars.ssqp}", "model.pretrained=${vars.pretrained}"]
        settings += ["model.num_layers=${vars.num_layers}"]
    data = [f"data.train=@{separator}_train", f"data.validation=@{separator}_dev"]
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
    """A data set of the mixtures between two percentages; those from 0 up are labelled.

    At full scale 100 % are 13900 of the 50800 mixtures of train-360.
    """
    full = {0: 0.0, 10: 0.02736, 50: 0.13681, 100: 0.27362}
    share = [percent / 100 if mini else full[percent] for percent in (first, last)]
    overrides = ["corpus=stored", "corpus.noise=false", "corpus.data=${vars.mixtures}"]
    overrides += [f"subset=[{share[0]},{share[1]}]", f"mixtures_only={str(first > 0).lower()}"]
    return StageConfig("shards", [], overrides)


def trained_and_tested(runs: Iterable[str], mini: bool) -> Stages:
    """Runs METHOD_PERCENT and their tests: ctn learns from labelled mixtures, others from all."""
    stages = {}
    for run in runs:
        method, percent = run.split("_")
        rest = f"@unlabelled_{100 - int(percent)}"
        overrides = [f"data.train=@labelled_{percent}"]
        if method != "ctn":
            overrides += [f"data.extra=[{{name: unlabelled, url: {rest}, weight: 1.0}}]"]
        if method == "sslm":
            overrides += ["objective.estimator.url=@ssqp_dr"]
        stages[run] = train("ctn_subset" if method == "ctn" else method, mini, (), overrides)
        stages[run].title = f"{TABLE3[method][0]} ({percent} %)"
    return stages | {f"{run}_test": StageConfig("evaluate", [run]) for run in runs}


def train(
    experiment: str, mini: bool, settings: Sequence[str] = (), overrides: Sequence[str] = ()
) -> StageConfig:
    """Train an experiment, at scale mini with fewer steps."""
    small = [*MINI.get(experiment, ()), f"training.max_steps={MINI_STEPS.get(experiment, 500)}"]
    settings = [*settings, *(small if mini else ())]
    return StageConfig("train", [], list(overrides), "", f"dang2023/{experiment}", settings)


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
        vars=dict(VARS_MINI if mini else VARS),
        results=results,
        stages=stages,
        overrides={"shards": shards, "evaluate": workers, "estimate": workers},
        tables=tables,
    )


PIPELINES = (figure3, table1, table2, figure4, chain, table3, table4)
