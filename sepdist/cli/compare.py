"""Compare two evaluations of the same data: what b gains over a, and whether that is by chance.

    sepdist compare a=evaluation/pit b=evaluation/ptft
    sepdist compare "a=[pit/seed-0,pit/seed-1]" "b=[ptft/seed-0,ptft/seed-1]"

For each metric it prints the means, their difference with a 95 % interval from a bootstrap over
speakers, and the p value of a paired sign-flip test over speakers. With several seeds, which are
compared in pairs, the bootstrap draws seeds too, and Student's interval over seeds stands beside.
"""

from sepdist.cli.compose import Program
from sepdist.config import CompareConfig

main = Program("compare", CompareConfig, __doc__, "sepdist.inference.comparison:compare")
