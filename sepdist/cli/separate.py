"""Separate recordings of any rate and length into one file per speaker.

    sepdist separate --model runs/a --output separated meeting.wav
    sepdist separate --model s3://bucket/exports/a --output s3://bucket/out a.wav s3://bucket/b.flac

The recording is read in blocks (channels averaged), resampled to the model's rate and cut into
overlapping windows, so memory does not grow with its length. The windows are joined by cross-fades;
the correlation of the estimates on the overlap carries the order of the speakers from one to the
next. Each output then gets the gain that brings the sum of all outputs closest to the recording;
if one would clip, all are scaled down together. The outputs <stem>_s1.wav, ... are mono 16-bit, at
the recording's rate and of its length to the sample, and appear only when they are complete.
A folder stands for all recordings below it. Recordings of one stem keep their folders: a/x.wav and
b/x.wav become a/x_s1.wav, ... and b/x_s1.wav, ... One that cannot be separated is named and left
out, and the exit status is 1.

With --stream FORMAT a causal model separates a pipe (-) block by block. A 16-bit WAV file or raw
mono samples at the model's rate come in; raw samples of that format go out, a channel per voice, at
the model's own level: f32le never clips.
"""

import argparse
import io
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath

from sepdist.console import printable, progress_bar, user_console
from sepdist.inference.windows import (
    FORMATS,
    PCM,
    SeparationError,
    Windows,
    output_names,
    output_stems,
)

WINDOW_OPTIONS = {
    "window_seconds": "length of the model's input",
    "overlap_seconds": "shared by neighbours, at most half a window; longer than the pauses in "
    "the speech it keeps the speakers apart",
    "batch_size": "windows at once: more may be faster on a GPU, and take more memory",
}


def main() -> int:
    """Separate each recording by itself; exit status 1 if one fails, named with the reason."""
    given = _parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names that are not UTF-8, as they are
    failed: list[str] = []
    with user_console(stopped="nothing is left of the unfinished recording") as console:
        windows = {name: getattr(given, name) for name in WINDOW_OPTIONS}
        Windows(**windows)  # raises for those that do not fit each other
        if given.stream and [*given.recordings, given.output] != ["-", "-"]:
            raise SeparationError("--stream goes from pipe to pipe: give - and --output -")
        stems = output_stems([one for name in given.recordings for one in _files_of(name)])
        _check_names(stems, given.output, given.format)
        # Only now, when the command line is right, what imports torch.
        from sepdist.allocator import keep_freed_memory
        from sepdist.inference.separator import load

        options = {name: getattr(given, name) for name in ("device", "plugins", "compile")}
        separator = load(given.model, **options, **windows)
        keep_freed_memory()
        if given.stream:
            from sepdist.inference.streaming import separate_stream

            pipes = (sys.stdin.buffer, sys.stdout.buffer)
            separate_stream(separator, *pipes, given.stream, console.print)
            return 0
        separate = partial(separator.file, output_folder=given.output, file_format=given.format)
        for recording, stem in stems.items():
            try:
                with progress_bar(console, printable(PurePosixPath(recording).name, "")) as advance:
                    result = separate(recording, stem=stem, progress=advance)
            except (ValueError, OSError) as error:
                failed.append(printable(str(error), ""))
                console.print(f"error: {failed[-1]}")
                continue
            for warning in result.warnings:
                console.print(f"warning: {printable(warning, '')}")
            print("\n".join(result.outputs))
        if len(stems) > 1:
            counts = f"{len(stems) - len(failed)} separated, {len(failed)} failed"
            console.print("\n  ".join([counts, *failed]))
    return int(bool(failed))


def _files_of(name: str) -> list[str]:
    """The audio files below a local folder, or `name` itself."""
    if not os.path.isdir(folder := os.path.expanduser(name)):
        return [name]
    from sepdist.audio import find_files  # late: TAB does without NumPy

    return [str(path) for path in find_files(folder)]


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
    stream = "causal models: - in blocks to --output -, as raw samples of this format"
    parser.add_argument("--stream", choices=PCM, help=stream)
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


def _check_names(stems: Mapping[str, str], output: str, file_format: str) -> None:
    """Refuse outputs that would replace a recording."""
    places = {os.path.realpath(os.path.expanduser(one)) for one in stems}
    for recording, stem in stems.items():
        for name in output_names(stem, 8, file_format):
            if os.path.realpath(os.path.join(os.path.expanduser(output), name)) in places:
                wrong = f"an output of {recording} would replace the recording {name}"
                raise SeparationError(f"{wrong}: use another --output")
