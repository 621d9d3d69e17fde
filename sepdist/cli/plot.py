"""Figures: what several runs, or other stages, left behind in, a PNG out.

    python -m sepdist plot figure2.png "from scratch=runs/scratch" "PT-FT (SE)=runs/finetune" --title Libri2Mix
    python -m sepdist plot gap.png "SSLM-SS (10%)=runs/sslm" --kind gap

figure2, of paper 1: above, the validation SI-SNR by epoch, a line for each run; below, the share of label assignments
that switched since the epoch before, bars side by side. gap, of semi-supervised runs: above, the SI-SNR that the judge
predicts on the validation set beside the true one, which part where it is fooled; below, the weight of the unsupervised
loss. Runs may still be going on.

histogram, of data sets with estimates: how their SI-SNR is distributed (paper 2, figure 3). scatter, of the outputs of
`sepdist.judge`: predicted over true SI-SNR of mixtures (figure 4). All may be on local disk or s3://.
"""

import argparse
from collections.abc import Sequence

from sepdist.config import ConfigError, FigureConfig
from sepdist.console import user_console
from sepdist.papers.figures import FIGURES, draw


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", help="the PNG file, a path or s3://")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="LABEL=FOLDER",
        help="run_dir, data set or output, in their order",
    )
    parser.add_argument("--title", default="", help="above the picture")
    parser.add_argument(
        "--kind", choices=FIGURES, default="figure2", help="which figure (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    with user_console() as console:
        if wrong := [one for one in given.runs if "=" not in one]:
            raise ConfigError(f"{wrong[0]}: give LABEL=FOLDER")
        runs = dict(one.split("=", 1) for one in given.runs)
        draw(FigureConfig(runs, given.output, given.title, given.kind), console)


if __name__ == "__main__":
    main()
