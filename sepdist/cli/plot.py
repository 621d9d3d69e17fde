"""Draw a figure of the papers from runs, data sets or scores.

    sepdist plot figure2.png "from scratch=runs/a" "PT-FT (SE)=runs/b" --title Libri2Mix
    sepdist plot gap.png "SSLM-SS (10%)=runs/sslm" --kind gap

figure2 (paper 1): validation SI-SNR by epoch, and the share of label assignments that switched
since the epoch before. gap: predicted and true validation SI-SNR of semi-supervised runs, and the
weight of their unsupervised loss. histogram (paper 2, figure 3): SI-SNR of the estimates in data
sets. scatter (figure 4): predicted over true SI-SNR, from outputs of `sepdist estimate`. Runs may
still be going on; all folders may be on local disk or s3://.
"""

import argparse
from collections.abc import Sequence

from sepdist.config import ConfigError
from sepdist.console import user_console
from sepdist.papers.figures import FIGURES, FigureConfig, draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the PNG file, a path or s3://")
    folders = "run_dirs, data sets or outputs, in drawing order"
    parser.add_argument("runs", nargs="+", metavar="TITLE=FOLDER", help=folders)
    parser.add_argument("--title", default="", help="title of the figure")
    kind = "which figure (default: %(default)s)"
    parser.add_argument("--kind", choices=FIGURES, default="figure2", help=kind)
    given = parser.parse_args(arguments)
    with user_console() as console:
        if wrong := [one for one in given.runs if "=" not in one]:
            raise ConfigError(f"{wrong[0]}: give TITLE=FOLDER")
        runs = dict(one.split("=", 1) for one in given.runs)
        draw(FigureConfig(runs, given.output, given.title, given.kind), console)
