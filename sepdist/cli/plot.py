"""Draw a figure of the papers from runs, data sets or scores.

    sepdist plot output=figure2.png title=Libri2Mix "runs.from scratch=runs/a" "runs.PT-FT=runs/b"
    sepdist plot output=gap.png kind=gap "runs.SSLM-SS (10%)=runs/sslm"

figure2 (paper 1): validation SI-SNR by epoch, and the share of label assignments that switched
since the epoch before. gap: predicted and true validation SI-SNR of semi-supervised runs, and the
weight of their unsupervised loss. histogram (paper 2, figure 3): SI-SNR of the estimates in data
sets. scatter (figure 4): predicted over true SI-SNR, from outputs of `sepdist estimate`. Runs may
still be going on; all folders may be on local disk or s3://.
"""

from sepdist.cli.compose import Program
from sepdist.papers.schema import FigureConfig

main = Program("plot", FigureConfig, __doc__, "sepdist.papers.figures:draw")
