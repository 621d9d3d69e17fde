"""Separate recordings: audio of any rate and length in, one file per speaker out.

    python -m sepdist separate --model runs/a --output separated meeting.wav
    python -m sepdist separate --model s3://bucket/exports/a --output s3://bucket/out --format flac a.wav s3://bucket/b.flac

The recording is read in blocks (channels averaged), resampled to the model's rate and cut into overlapping windows, so
memory does not grow with its length. Windows are joined by cross-fades; the order of the speakers is carried from one
to the next by the estimates' correlation on the overlap. Each output then gets the gain with which the sum of all comes
closest to the recording, and, if one would clip, all are scaled down together. Outputs <stem>_s1.wav, ... are mono
16-bit, as long as the input to the sample and at its rate, and appear only when they are complete.
"""

import argparse
import sys
from pathlib import Path, PurePosixPath

import torch

from sepdist import storage
from sepdist.allocator import keep_freed_memory
from sepdist.inference.separator import (
    FORMATS,
    output_names,
    separate_file,
)
from sepdist.inference.stitching import (
    SeparationError,
    Windows,
)


def main() -> None:
    """The command line; a recording that fails is named, the others are still separated, and the exit status is 1."""
    arguments = _parser().parse_args()
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        _check_names(arguments.recordings, arguments.output, arguments.format)
        windows = Windows(arguments.window_seconds, arguments.overlap_seconds, arguments.batch_size)
        from sepdist.inference.export import load_separator

        export = load_separator(arguments.model)
        model = export.model.to(arguments.device)
        keep_freed_memory()
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"error: {error}", markup=False)
        sys.exit(1)
    failed = False
    for recording in arguments.recordings:
        try:
            with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
                task = bar.add_task(PurePosixPath(recording).name, total=None)
                result = separate_file(
                    model,
                    export.sample_rate,
                    recording,
                    arguments.output,
                    windows=windows,
                    file_format=arguments.format,
                    device=arguments.device,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),  # noqa: B023
                )
        except (ValueError, OSError) as error:
            console.print(f"error: {error}", markup=False)
            failed = True
            continue
        for warning in result.warnings:
            console.print(f"warning: {warning}", markup=False)
        for output in result.outputs:
            print(output)
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    defaults = Windows()
    parser = argparse.ArgumentParser(
        prog="python -m sepdist separate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "recordings",
        nargs="+",
        metavar="RECORDING",
        help="audio file (wav, flac, ogg, ...) or s3://",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="run_dir (its best checkpoint is taken) or export; path or s3://",
    )
    parser.add_argument(
        "--output",
        required=True,
        help="folder or s3:// prefix for <stem>_s1.wav, <stem>_s2.wav, ...",
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), default="wav", help="of the outputs (default: wav)"
    )
    parser.add_argument(
        "--window-seconds",
        type=float,
        default=defaults.window_seconds,
        help="what the model sees (default: %(default)s)",
    )
    parser.add_argument(
        "--overlap-seconds",
        type=float,
        default=defaults.overlap_seconds,
        help="shared by neighbours, at most half a window; longer than the pauses keeps speakers apart (%(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=defaults.batch_size,
        help="windows at once; memory grows with it (%(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu or cuda (default: %(default)s)",
    )
    return parser


def _check_names(recordings: list[str], output: str, file_format: str) -> None:
    """Two recordings of one stem would write the same files, and an output must not replace a recording."""
    stems: dict[str, str] = {}
    given = {str(Path(name).resolve()) for name in recordings if not storage.is_remote(name)}
    for recording in recordings:
        stem = PurePosixPath(recording).stem
        if stem in stems:
            raise SeparationError(
                f"{stems[stem]} and {recording} would both be written as {stem}_s1.{file_format}"
            )
        stems[stem] = recording
        for name in output_names(recording, 8, file_format):
            if not storage.is_remote(output) and str(Path(output, name).resolve()) in given:
                raise SeparationError(
                    f"an output of {recording} would replace the recording {name}: use another --output"
                )


if __name__ == "__main__":
    main()
