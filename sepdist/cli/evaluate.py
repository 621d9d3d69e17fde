"""Score a separator on test sets: SI-SNR, SDR and other scores of every utterance, and their means.

    sepdist evaluate model=runs/a data=data/test output=evaluation num_workers=2
    sepdist evaluate model=s3://b/exports/a data=s3://b/data/test output=s3://b/evaluation
    sepdist evaluate model=runs/a data=[data/a/test,data/b/test] output=evaluation
    sepdist evaluate estimates=theirs data=data/test output=theirs-scored metrics=[si_snri,pesq]

Every utterance is scored alone and at full length, with one thread per worker, so the results do
not depend on the number of workers. One without a score (silent, damaged, too short) is in no mean;
the exit status is 1 if there are more than `max_unscored`. `estimates` has the files of another
system, s1/ID.wav, s2/ID.wav or ID_s1.wav, ID_s2.wav, in any order of the speakers.

    output/results.json      means, 95 % intervals, ...; the model, data and versions; written last
    output/utterances.csv    one line per utterance, with the reason where it has no score
    output/histogram.png     distribution of SI-SNRi, and output against input SI-SNR
    output/listening/        index.html with players and spectrograms of the first `num_listening`
                             utterances; <n>/mixture.wav, source_1.wav, estimate_1.wav, ...

Several data sets have a folder each below output, and results.json has all.
"""

from sepdist.cli.compose import Program
from sepdist.config import EvaluateConfig

main = Program("evaluate", EvaluateConfig, __doc__, "sepdist.inference.evaluation:evaluate")
