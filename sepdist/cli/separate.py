"""Separate recordings of any rate and length into one file per speaker.

    sepdist separate --model runs/a --output separated meeting.wav
    sepdist separate --model s3://bucket/exports/a --output s3://bucket/out a.wav s3://bucket/b.flac

The recording is read in blocks (channels averaged), resampled to the model's rate and cut into
overlapping windows, so memory does not grow with its length. The windows are joined by cross-fades;
the correlation of the estimates on the overlap carries the order of the speakers from one to the
next. Each output then gets the gain that brings the sum of all outputs closest to the recording;
if one would clip, all are scaled down together. The outputs <stem>_s1.wav, ... are mono 16-bit, at
the recording's rate and of its length to the sample, and appear only when they are complete.
"""

import argparse
from pathlib import PurePosixPath

from sepdist import storage
from sepdist.console import progress_bar, user_console
from sepdist.inference.windows import FORMATS, SeparationError, Windows, output_names

WINDOW_OPTIONS = {
    "window_seconds": "length of the model's input",
    "overlap_seconds": "shared by neighbours, at most half a window; longer than the pauses in "
    "the speech it keeps the speakers apart",
    "batch_size": "windows at once: more may be faster on a GPU, and take more memory",
}


def main() -> int:
    """Separate each recording; where one fails, name it, go on and return exit status 1."""
    given = _parser().parse_args()
    status = 0
    with user_console(stopped="nothing is left of the unfinished recording") as console:
        windows = {name: getattr(given, name) for name in WINDOW_OPTIONS}
        Windows(**windows)  # raises for those that do not fit each other
        _check_names(given.recordings, given.output, given.format)
        # Only now, when the command line is right, what imports torch.
        from sepdist.allocator import keep_freed_memory
        from sepdist.inference.separator import load

        options = {name: getattr(given, name) for name in ("device", "plugins", "compile")}
        separator = load(given.model, **options, **windows)
        keep_freed_memory()
        for recording in given.recordings:
            try:
                with progress_bar(console, PurePosixPath(recording).name) as advance:
                    result = separator.file(
                        recording, given.output, file_format=given.format, progress=advance
                    )
            except (ValueError, OSError) as error:
                console.print(f"error: {error}")
                status = 1
                continue
            for warning in result.warnings:
                console.print(f"warning: {warning}")
            print("\n".join(result.outputs))
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recordings", nargs="+", help="audio file (wav, flac, ogg, ...) or s3://")
    model = "run_dir (its best checkpoint is taken) or export; path or s3://"
    parser.add_argument("--model", required=True, help=model)
    output = "folder or s3:// prefix for <stem>_s1.wav, <stem>_s2.wav, ..."
    parser.add_argument("--output", required=True, help=output)
    parser.add_argument("--format", choices=FORMATS, default="wav", help="of the outputs (wav)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    plugins = "package that may define the model (repeat for more)"
    parser.add_argument("--plugins", action="append", default=[], metavar="PACKAGE", help=plugins)
    compiled = "compile the model where it can be: seconds at first, then faster"
    parser.add_argument("--compile", action="store_true", help=compiled)
    for name, text in WINDOW_OPTIONS.items():
        value = getattr(Windows(), name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"{text} ({value})")
    return parser


def _check_names(recordings: list[str], output: str, file_format: str) -> None:
    """Refuse two recordings with the same outputs, and outputs that would replace a recording."""
    writers: dict[str, str] = {}
    places = {storage.absolute(name) for name in recordings}
    for recording in recordings:
        names = output_names(recording, 8, file_format)
        if first := writers.get(names[0]):
            raise SeparationError(f"{first} and {recording} would both be written as {names[0]}")
        writers[names[0]] = recording
        for name in names:
            if storage.absolute(storage.join(output, name)) in places:
                raise SeparationError(
                    f"an output of {recording} would replace the recording {name}: "
                    "use another --output"
                )
