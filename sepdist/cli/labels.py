"""Measure label switching after training: every checkpoint of a run assigns a whole data set.

    sepdist labels model=runs/a data=data/train output=labels num_workers=2

Paper 1's authors measured figure 2 (c) and (d) in this way: each checkpoint is run over whole
utterances in a fixed order. It needs a checkpoint of every epoch: train with training.keep_every=E
training.checkpoint_every=E, where E is the number of steps of an epoch.

    output/step-000000500.csv   id,permutation: rank of the best permutation of each utterance
    output/switching.json       share of utterances whose permutation changed from one checkpoint to
                                the next, and its agreement with the rate measured in training;
                                written last

The objective `fixed_permutations` reads these tables.
"""

from sepdist.cli.compose import Program
from sepdist.config import EvaluateConfig

main = Program("evaluate", EvaluateConfig, __doc__, "sepdist.inference.switching:measure_switching")
