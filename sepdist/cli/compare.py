"""Compare two evaluations of the same data: what b gains over a, and whether that is by chance.

    sepdist compare a=evaluation/pit b=evaluation/ptft

For each metric it prints the means, their difference with a 95 % interval from a bootstrap over
speakers, and the p value of a paired sign-flip test over speakers.
"""

from sepdist.cli.compose import Program
from sepdist.config import CompareConfig

main = Program("compare", CompareConfig, __doc__, "sepdist.inference.comparison:compare")
