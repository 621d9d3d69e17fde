"""Score a model on a test set: a run_dir or export and a data set in; results.json, utterances.csv and pictures out.

    python -m sepdist evaluate model=runs/a data=data/test output=evaluation num_workers=2
    python -m sepdist evaluate model=s3://bucket/exports/a data=s3://bucket/data/test output=s3://bucket/evaluation

Every utterance is scored alone and at full length, with one thread per worker, so the results do not depend on how many
workers there are.

    output/results.json      means, medians, deviations; which model, which data, which versions; written last
    output/utterances.csv    one line per utterance
    output/histogram.png     distribution of SI-SNRi, and output against input SI-SNR
    output/listening/<n>/    mixture.wav, source_1.wav, estimate_1.wav, ..., spectrogram.png of the first few
"""

import hydra
from omegaconf import DictConfig

from sepdist import config
from sepdist.config import EvaluateConfig
from sepdist.console import user_console
from sepdist.inference.evaluation import evaluate

config.register_schemas()


config.register_evaluate()


@hydra.main(version_base="1.3", config_path="pkg://hydra.conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """Compose, evaluate, print the table; errors of the user are one line and exit status 1."""
    with user_console() as console:
        evaluate(config.typed(composed, EvaluateConfig), console)


if __name__ == "__main__":
    main()
