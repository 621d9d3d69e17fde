"""Tables 1 to 4 and figures 3 and 4 of paper 2 (Dang et al. 2023) as pipelines.

    sepdist pipeline experiment=dang2023/table1 data_root=data output=runs/dang2023 scale=mini

Every function returns the stages and the tables of one pipeline. All pipelines share the name
`dang2023`, so with one output a stage that one of them has finished is not run again by another.
`mini` is the scale of two CPU cores: fewer SI-SNR estimators, all with the encoder that vars.ssqp
and vars.pretrained choose.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sepdist.papers.schema import PipelineConfig, RowConfig, StageConfig, TableConfig

Stages = dict[str, StageConfig]
Numbers = Sequence[float | None]

SEPARATORS = ("sf", "dr", "ctn")  # SepFormer, DPRNN, Conv-TasNet
WAV2VEC2 = ["model=ssqp_wav2vec2"]
ENCODERS = {
    "wav2vec2": WAV2VEC2,
    "hubert": [
        *WAV2VEC2,
        "model.pretrained=facebook/hubert-base-ls960",
        "model.encoder.model_type=hubert",
    ],
    "wavlm": [
        *WAV2VEC2,
        "model.pretrained=microsoft/wavlm-base",
        "model.encoder.model_type=wavlm",
    ],
}
CHOSEN_ENCODER = [
    "model=${vars.ssqp}",
    "model.pretrained=${vars.pretrained}",
    "model.num_layers=${vars.num_layers}",
]
CHOSEN_MODE = "model.mode=${vars.mode}"
MINI = {  # settings of the experiments at scale mini
    "sf": ["training.max_steps=375"],
    "dr": ["training.max_steps=500"],
    "ctn": ["training.max_steps=500"],
    "ctn_subset": ["training.max_steps=500"],
    "mixit": ["training.max_steps=500"],
    # 500 steps x 16 / 150: f(t) rises to 0.5 in the end, as in the paper's 150 epochs
    "sslm": [
        "objective.epoch_samples=53",
        "validation.max_seconds=4.0",
        "training.max_steps=500",
    ],
    "ssqp": [
        "data.micro_batch=2",
        "validation.max_seconds=4.0",
        "optim.lr=0.0002",
        "training.max_steps=375",
    ],
}


def figure3(mini: bool) -> PipelineConfig:
    """Three separators, their estimates of train-100, dev and test, and the SI-SNR of these."""
    stages = separators(SEPARATORS, mini)
    stages["figure3"] = StageConfig(
        "figure",
        uses=[f"{name}_train" for name in SEPARATORS],
        title="Training sets",
        overrides=["kind=histogram"],
    )
    return pipeline("figure3", "Figure 3, SI-SNR of the separators' estimates", stages, [], mini)


def separators(names: Iterable[str], mini: bool) -> Stages:
    """Separators, and the data sets with their estimates on which estimators train and are scored."""
    stages = {name: train(name, mini) for name in names}
    data = {
        "train": ["corpus.data=${vars.estimator_data}", "subset=${vars.estimator_subset}"],
        "dev": ["corpus.data=${vars.dev}"],
        "test": ["corpus.data=${vars.test}"],
    }
    for name in names:
        model = ["corpus=separated", "corpus.noise=false", f"corpus.model=@{name}"]
        device = ["corpus.device=${vars.device}", "gpus_per_worker=${vars.gpus}"]
        for split, source in data.items():
            stages[f"{name}_{split}"] = StageConfig(
                "shards", title=name.upper(), overrides=[*model, *source, *device]
            )
    return stages


TABLE1 = {  # LCC on the estimates of SF, DR and CTN; the baseline is the CNN of [11]
    "realm_sf": ("baseline, SF, CNN", [0.80, 0.80, 0.81]),
    "ssqp_sf_wav2vec2": ("SSQP-Net, SF, wav2vec2", [0.87, 0.89, 0.85]),
    "ssqp_sf_hubert": ("SSQP-Net, SF, hubert", [0.85, 0.86, 0.82]),
    "ssqp_sf_wavlm": ("SSQP-Net, SF, wavlm", [0.87, 0.90, 0.86]),
    "ssqp_dr_wav2vec2": ("SSQP-Net, DR, wav2vec2", [0.86, 0.90, 0.87]),
    "ssqp_dr_hubert": ("SSQP-Net, DR, hubert", [0.84, 0.89, 0.84]),
    "ssqp_dr_wavlm": ("SSQP-Net, DR, wavlm", [0.86, 0.90, 0.87]),
    "ssqp_ctn_wav2vec2": ("SSQP-Net, CTN, wav2vec2", [0.85, 0.89, 0.88]),
    "ssqp_ctn_hubert": ("SSQP-Net, CTN, hubert", [0.84, 0.89, 0.89]),
    "ssqp_ctn_wavlm": ("SSQP-Net, CTN, wavlm", [0.86, 0.90, 0.89]),
}
TABLE1_MINI: dict[str, tuple[str, Numbers]] = {
    "realm_dr": ("CNN [11], DR", ()),
    "ssqp_dr": ("SSQP-Net, DR", ()),
    "realm_ctn": ("CNN [11], CTN", ()),
    "ssqp_ctn": ("SSQP-Net, CTN", ()),
}


def table1(mini: bool) -> PipelineConfig:
    """Correlation of predicted and true SI-SNR, by encoder and by the separators' estimates."""
    stages = figure3(mini).stages
    rows = TABLE1_MINI if mini else TABLE1
    for name in rows:
        stages |= scored(name, estimator(name, mini))
    tables = [estimator_table("Table 1, LCC", "lcc", rows)]
    if mini:
        tables.append(estimator_table("The same, MAE in dB", "mae", rows))
    title = "Table 1, correlation with the true SI-SNR"
    return pipeline("table1", title, stages, tables, mini)


TABLE2 = {  # MAE in dB on the estimates of SF, DR and CTN
    "ssqp_sf_wav2vec2": ("OTFP, SF", [1.39, 2.02, 1.77]),
    "ssqp_dr_wav2vec2": ("OTFP, DR", [1.28, 1.39, 1.33]),
    "ssqp_ctn_wav2vec2": ("OTFP, CTN", [1.59, 1.28, 1.20]),
    "ssqp_sf_wav2vec2_otfs": ("OTFS, SF", [1.30, 2.00, 1.57]),
    "ssqp_dr_wav2vec2_otfs": ("OTFS, DR", [1.36, 1.31, 1.29]),
    "ssqp_ctn_wav2vec2_otfs": ("OTFS, CTN", [1.49, 1.62, 1.20]),
}
TABLE2_MINI: dict[str, tuple[str, Numbers]] = {
    "ssqp_dr": ("OTFP, DR", ()),
    "ssqp_dr_otfs": ("OTFS, DR", ()),
}


def table2(mini: bool) -> PipelineConfig:
    """Error of SSQP-Net, all estimates of a mixture at once (OTFP) or each alone (OTFS)."""
    stages = figure3(mini).stages
    rows = TABLE2_MINI if mini else TABLE2
    for name in rows:
        mode = "otfs" if name.endswith("_otfs") else "otfp"
        stage = estimator(name.removesuffix("_otfs"), mini)
        stage.settings = [one for one in stage.settings if one != CHOSEN_MODE]
        stage.settings.append(f"model.mode={mode}")
        stages |= scored(name, stage)
    tables = [estimator_table("Table 2, MAE in dB", "mae", rows)]
    return pipeline("table2", "Table 2, error of OTFP and OTFS", stages, tables, mini)


def figure4(mini: bool) -> PipelineConfig:
    """Predicted over true SI-SNR of the baseline and of SSQP-Net, on DR's estimates of test."""
    stages = figure3(mini).stages
    titles = (
        {"realm_dr": "CNN [11] (DR)", "ssqp_dr": "SSQP-Net (DR)"}
        if mini
        else {"realm_sf": "baseline", "ssqp_dr_wav2vec2": "SSQP-Net (DR)"}
    )
    stages |= {name: estimator(name, mini) for name in titles}
    stages |= {f"{name}_on_dr": estimate(name, "dr", titles[name]) for name in titles}
    stages["figure4"] = StageConfig(
        "figure", uses=[f"{name}_on_dr" for name in titles], overrides=["kind=scatter"]
    )
    return pipeline("figure4", "Figure 4, predicted over true SI-SNR", stages, [], mini)


def estimator(name: str, mini: bool) -> StageConfig:
    """Train an SI-SNR estimator: realm_SEPARATOR or ssqp_SEPARATOR[_ENCODER]."""
    kind, separator, *encoder = name.split("_")
    overrides = [f"data.train=@{separator}_train", f"data.validation=@{separator}_dev"]
    if kind == "ssqp":
        settings = ENCODERS[encoder[0]] if encoder else [*CHOSEN_ENCODER, CHOSEN_MODE]
        return train("ssqp", mini, settings, overrides=overrides)
    # The CNN of REAL-M, on SI-SNR clipped to 0 to 10 dB (Subakan et al. 2022): Adam 1e-4, 200
    # epochs of 13900 / 8 = 1738 steps.
    full = ["schedule.warmup_steps=0", "schedule.patience=2", "training.max_steps=347600"]
    own = ["model=sisnr_cnn", "objective.limits=[0.0,10.0]"]
    stage = train("ssqp", mini, own, overrides=overrides)
    stage.settings += ["training.max_steps=250"] if mini else full
    return stage


def estimate(name: str, separator: str, title: str = "") -> StageConfig:
    """Score an estimator on the estimates that a separator made of the test set."""
    overrides = [f"data=@{separator}_test"]
    return StageConfig("estimate", uses=[name], title=title, overrides=overrides)


def scored(name: str, stage: StageConfig) -> Stages:
    """An estimator and its scores on the estimates of every separator."""
    return {name: stage} | {f"{name}_on_{one}": estimate(name, one) for one in SEPARATORS}


def estimator_table(
    title: str, metric: str, rows: Mapping[str, tuple[str, Numbers]]
) -> TableConfig:
    """A row for each estimator, a column for each separator."""
    cells = {name: [f"{name}_on_{one}:{metric}" for one in SEPARATORS] for name in rows}
    return TableConfig(
        title,
        [name.upper() for name in SEPARATORS],
        [RowConfig(label, cells[name], list(paper)) for name, (label, paper) in rows.items()],
    )


SI_SNRI = "metrics_db.si_snri.mean"
GAP_TITLE = "Predicted and true SI-SNR"


def chain(mini: bool) -> PipelineConfig:
    """The whole chain: DR, its estimates, SSQP-Net, SSLM-SS with 10 % labelled beside CTN."""
    stages = separators(["dr"], mini)
    stages["ssqp_dr"] = estimator("ssqp_dr", mini)
    stages["ssqp_dr_on_dr"] = estimate("ssqp_dr", "dr")
    stages |= subset("labelled_10", 0, 10, mini) | subset("unlabelled_90", 10, 100, mini)
    runs = {name: semisupervised(name, mini) for name in ("ctn_10", "sslm_10")}
    stages |= runs | {f"{name}_test": StageConfig("evaluate", uses=[name]) for name in runs}
    stages["gap_10"] = StageConfig(
        "figure", uses=["sslm_10"], title=GAP_TITLE, overrides=["kind=gap"]
    )
    separation = TableConfig(
        "SI-SNRi in dB, 10 % labelled",
        ["SI-SNRi"],
        [
            RowConfig("CTN", [f"ctn_10_test:{SI_SNRI}"], [8.8]),
            RowConfig("SSLM-SS", [f"sslm_10_test:{SI_SNRI}"], [11.7]),
        ],
    )
    estimation = TableConfig(
        "SSQP-Net on DR's estimates of the test set",
        ["LCC", "MAE in dB"],
        [RowConfig("SSQP-Net, OTFP", ["ssqp_dr_on_dr:lcc", "ssqp_dr_on_dr:mae"], [0.90, 1.39])],
    )
    return pipeline("chain", "From separators to SSLM-SS", stages, [separation, estimation], mini)


TABLE3: dict[str, tuple[str, Numbers]] = {  # SI-SNRi in dB with 10, 50 and 100 % labelled
    "ctn": ("CTN", [8.8, 11.6, 13.0]),
    "mixit": ("MixIT", [11.5, 11.8, None]),
    "sslm": ("SSLM-SS", [11.7, 12.9, None]),
}


def table3(mini: bool) -> PipelineConfig:
    """CTN, MixIT and SSLM-SS with 10, 50 and 100 % labelled; begins with the chain."""
    stages = chain(mini).stages
    stages |= subset("labelled_50", 0, 50, mini) | subset("labelled_100", 0, 100, mini)
    stages |= subset("unlabelled_50", 50, 100, mini)
    names = ("ctn_100", "ctn_50", "mixit_50", "mixit_10", "sslm_50")
    stages |= {name: semisupervised(name, mini) for name in names}
    stages |= {f"{name}_test": StageConfig("evaluate", uses=[name]) for name in names}
    order = ["ctn_100", "ctn_50", "ctn_10", "mixit_50", "mixit_10", "sslm_50", "sslm_10"]
    stages["curves"] = StageConfig("figure", uses=order, title="Table 3")
    stages["gap"] = StageConfig(
        "figure", uses=["sslm_50", "sslm_10"], title=GAP_TITLE, overrides=["kind=gap"]
    )
    rows = []
    for method, (title, paper) in TABLE3.items():
        runs = [f"{method}_{percent}" for percent in (10, 50, 100)]
        cells = [f"{run}_test:{SI_SNRI}" if run in stages else "-" for run in runs]
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

    At scale mini: Whisper on mixtures of LibriSpeech's shape.
    """
    stages = table3(mini).stages
    stages |= {f"{name}_wer": StageConfig("recognise", uses=[name]) for name in TABLE4}

    def cells(name: str, what: str) -> list[str]:
        return [f"{name}_wer:wer.OV{overlap}.{what}" for overlap in (10, 20, 30, 40)]

    rows = [RowConfig("Mixture", cells("ctn_100", "mixture"), [9.2, 15.3, 24.4, 32.5])]
    rows += [
        RowConfig(stages[name].title, cells(name, "separated"), list(paper))
        for name, paper in TABLE4.items()
    ]
    table = TableConfig("Table 4, WER in %", ["10", "20", "30", "40"], rows, digits=1)
    cfg = pipeline("table4", "Table 4, word error rates on LibriCSS", stages, [table], mini)
    if mini:
        # vars.speech: a tree of LibriSpeech's shape with the folder test
        cfg.vars |= {"speech": "speech", "recogniser": "whisper-base"}
        place = ["corpus=overlap", "corpus.root=${vars.speech}", "corpus.num_mixtures=30"]
        choice = ["num_workers=2", "recogniser=faster_whisper"]
    else:
        cfg.vars |= {"libricss": "libricss/for_release"}
        cfg.vars |= {"recogniser": "facebook/wav2vec2-base-960h"}
        place = ["corpus=libricss", "corpus.root=${vars.libricss}"]
        choice = ["num_workers=8", "use_gpu=true"]
    cfg.overrides["recognise"] = [*choice, *place, "recogniser.folder=${vars.recogniser}"]
    return cfg


def subset(name: str, first: int, last: int, mini: bool) -> Stages:
    """A data set of the mixtures between two percentages; unlabelled ones lose their sources.

    At full scale 100 % are 13900 of the 50800 mixtures of train-360.
    """
    full = {0: 0.0, 10: 0.02736, 50: 0.13681, 100: 0.27362}
    begin, end = (percent / 100 if mini else full[percent] for percent in (first, last))
    overrides = ["corpus=stored", "corpus.noise=false", "corpus.data=${vars.mixtures}"]
    overrides += [f"subset=[{begin},{end}]"]
    overrides += ["mixtures_only=true"] * name.startswith("unlabelled")
    return {name: StageConfig("shards", overrides=overrides)}


def semisupervised(name: str, mini: bool) -> StageConfig:
    """Train METHOD_PERCENT: ctn on the labelled mixtures, mixit and sslm on the rest too."""
    method, percent = name.split("_")
    overrides = [f"data.train=@labelled_{percent}"]
    if method != "ctn":
        unlabelled = f"@unlabelled_{100 - int(percent)}"
        overrides += [f"data.extra=[{{name: unlabelled, url: {unlabelled}, weight: 1.0}}]"]
    if method == "sslm":
        overrides += ["objective.estimator.url=@ssqp_dr"]
    experiment = "ctn_subset" if method == "ctn" else method
    title = f"{TABLE3[method][0]} ({percent} %)"
    return train(experiment, mini, title=title, overrides=overrides)


def train(experiment: str, mini: bool, settings: Sequence[str] = (), **stage: Any) -> StageConfig:
    """A training stage with the settings of its scale."""
    small = MINI[experiment] if mini else []
    return StageConfig(experiment=f"dang2023/{experiment}", settings=[*settings, *small], **stage)


def pipeline(
    results: str, title: str, stages: Stages, tables: list[TableConfig], mini: bool
) -> PipelineConfig:
    """The pipeline of one table or figure, with the data sets and devices of its scale."""
    values: dict[str, Any] = {
        "estimator_data": "${data_root}/libri2mix/train-100",
        "estimator_subset": [0.0, 1.0],
        "dev": "${data_root}/libri2mix/dev",
        "test": "${data_root}/libri2mix/test",
        "mixtures": "${data_root}/libri2mix/train-360",
        "device": "cuda",
        "gpus": 1,
        "ssqp": "ssqp_wav2vec2",
        "pretrained": "facebook/wav2vec2-base",
        "num_layers": "null",  # of the encoder; null: all
        "mode": "otfp",  # or otfs
    }
    workers = ["num_workers=8", "use_gpu=true"]
    if mini:
        values |= {"estimator_data": "${data_root}/sep-train", "estimator_subset": [0.0, 0.3]}
        values |= {"dev": "${data_root}/dev", "test": "${data_root}/test"}
        values |= {"mixtures": "${data_root}/sep-train", "device": "cpu", "gpus": 0}
        values["pretrained"] = "null"  # a real encoder: vars.ssqp=ssqp_whisper vars.pretrained=...
        workers = ["num_workers=2"]
    shards = ["num_workers=2", "samples_per_shard=50"] if mini else ["num_workers=8"]
    return PipelineConfig(
        name="dang2023-mini" if mini else "dang2023",
        title=title,
        test_data="${vars.test}",
        vars=values,
        results=results,
        scale="mini" if mini else "",
        stages=stages,
        overrides={"shards": shards, "evaluate": workers, "estimate": workers},
        tables=tables,
    )


PIPELINES = (figure3, table1, table2, figure4, chain, table3, table4)
