"""Score a separator on a test set: SI-SNR and SDR of every utterance, their means and pictures.

    sepdist evaluate model=runs/a data=data/test output=evaluation num_workers=2
    sepdist evaluate model=s3://b/exports/a data=s3://b/data/test output=s3://b/evaluation

Every utterance is scored alone and at full length, with one thread per worker, so the results do
not depend on the number of workers. One without a score (silent, damaged, too short) is in no mean;
the exit status is 1 if there are more than `max_unscored`.

    output/results.json      means, medians, deviations; the model, data and versions; written last
    output/utterances.csv    one line per utterance, with the reason where it has no score
    output/histogram.png     distribution of SI-SNRi, and output against input SI-SNR
    output/listening/<n>/    mixture.wav, source_1.wav, estimate_1.wav, ... and spectrogram.png of
                             the first `num_listening` utterances
"""

from sepdist.cli.compose import Program
from sepdist.config import EvaluateConfig

main = Program("evaluate", EvaluateConfig, __doc__, "sepdist.inference.evaluation:evaluate")
