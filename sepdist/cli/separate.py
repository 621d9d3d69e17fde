"""Separate recordings of any rate and length into one file per speaker.

    sepdist separate meeting.wav
    sepdist separate --model runs/a --output separated meeting.wav
    sepdist separate --model s3://bucket/exports/a --output s3://bucket/out a.wav s3://bucket/b.flac
    sepdist separate --model runs/a --output - - < in.wav > voices.wav

The recording is read in blocks (channels averaged), resampled to the model's rate and cut into
overlapping windows, so memory does not grow with its length. The windows are joined by cross-fades;
the correlation of the estimates on the overlap carries the order of the speakers from one to the
next. Each output then gets the gain that brings the sum of all outputs closest to the recording;
if one would clip, all are scaled down together. The outputs <stem>_s1.wav, ... are mono, at the
recording's rate and of its length to the sample, and appear only when they are complete.
A folder stands for all recordings below it, a quoted pattern ('talks/**/*.m4a') for the files it
matches. Recordings of one stem keep their folders: a/x.wav and b/x.wav become a/x_s1.wav, ... and
b/x_s1.wav, ... One that cannot be separated is named and left out, and the exit status is 1.
As a recording - is standard input, as the output it is standard output, for one file with a channel
per voice. m4a, webm, videos and the like need the extra `av`; their first audio track is taken.

With --stream FORMAT a causal model separates a pipe (-) block by block. A 16-bit WAV file or raw
mono samples at the model's rate come in; raw samples of that format go out, a channel per voice, at
the model's own level: f32le never clips.
"""

import argparse
import glob
import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from sepdist.console import printable, progress_bar, user_console
from sepdist.hub import READY
from sepdist.inference import windows
from sepdist.inference.windows import SeparationError, Windows

PLAIN = ("mean", "wav", "")  # channels, format and subtype where they are not given
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
    failed, sections = list[str](), list[Any]()  # those of the page
    with user_console(stopped="nothing is left of the unfinished recording") as console:
        sizes = {name: getattr(given, name) for name in WINDOW_OPTIONS}
        Windows(**sizes)  # raises for those that do not fit each other
        stems = _checked(given, console)
        # Only now, when the command line is right, what imports torch.
        from sepdist.allocator import keep_freed_memory
        from sepdist.inference.separator import load

        options = {name: getattr(given, name) for name in ("device", "plugins", "compile")}
        separator = load(given.model, **options, **sizes)
        if given.model == READY:
            console.print(f"model: {READY}, a small one; its card: {separator.url}/README.md")
        keep_freed_memory()
        if given.stream:
            from sepdist.inference.streaming import separate_stream

            pipes = (sys.stdin.buffer, sys.stdout.buffer)
            separate_stream(separator, *pipes, given.stream, console.print)
            return 0
        kept: Any = {name: getattr(given, name) for name in ("file_format", "subtype", "channels")}
        for recording, stem in stems.items():
            try:
                with progress_bar(console, printable(PurePosixPath(recording).name, "")) as advance:
                    kept |= {"stem": stem, "progress": advance}
                    result = separator.file(recording, given.output, **kept)
            except BrokenPipeError:  # of standard output
                raise
            except (ValueError, OSError) as error:
                failed.append(printable(str(error), ""))
                console.print(f"error: {failed[-1]}")
                continue
            for warning in result.warnings:
                console.print(f"warning: {printable(warning, '')}")
            if given.output != "-":
                print("\n".join(result.outputs))
            heard = [recording, *result.outputs] if recording != "-" else result.outputs
            sections.append((recording, [(PurePosixPath(one).name, one, "") for one in heard]))
        if given.page and sections:
            from sepdist.inference.listening import write_listening_page

            page = f"{given.output.rstrip('/')}/listening.html"
            write_listening_page(page, "Separated recordings", sections)
            print(page)
        if len(stems) > 1:
            counts = f"{len(stems) - len(failed)} separated, {len(failed)} failed"
            console.print("\n  ".join([counts, *failed]))
    return int(bool(failed))


def _checked(given: argparse.Namespace, console: Any) -> dict[str, str]:
    """The recordings with the stems of their outputs; SeparationError for a wrong command line."""
    if given.stream and [*given.recordings, given.output] != ["-", "-"]:
        raise SeparationError("--stream goes from pipe to pipe: give - and --output -")
    if given.stream and (given.channels, given.file_format, given.subtype) != PLAIN:
        raise SeparationError("--stream takes no --channels, --format or --subtype")
    found = [_files_of(name, given.output) for name in given.recordings]
    files, left_out = [one for own, _ in found for one in own], sum(count for _, count in found)
    if left_out:
        console.print(f"left out, as they lie in --output {given.output}: {left_out} files")
    if not files:
        raise SeparationError("no other recording is left")
    stems = windows.output_stems(files)
    windows.check_options(given.output, given.file_format, given.subtype, given.channels)
    if given.page and given.output == "-":
        raise SeparationError("--page needs a folder as the --output, to lie in")
    _check_names(stems, given.output, given.file_format, given.overwrite)
    return stems


def _files_of(name: str, output: str) -> tuple[list[str], int]:
    """The audio files below a local folder, the files that a pattern matches, or `name` itself.

    Those of the output folder are left out, unless it is the folder itself; and their number.
    """
    place, folder = (os.path.expanduser(one) for one in (name, output))
    if glob.has_magic(name) and "://" not in name and not os.path.lexists(place):
        files = sorted(one for one in glob.glob(place, recursive=True) if os.path.isfile(one))
        if not files:
            raise SeparationError(f"no file matches the pattern {name}")
    elif os.path.isdir(place):
        from sepdist.audio import find_files  # late: TAB does without NumPy

        files = [str(path) for path in find_files(place, containers=True)]
    else:
        return [name], 0
    inside = os.path.join(os.path.realpath(folder), "")
    if os.path.join(os.path.realpath(place), "").startswith(inside):
        return files, 0
    kept = [one for one in files if not os.path.realpath(one).startswith(inside)]
    return kept, len(files) - len(kept)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    audio = "audio file (wav, flac, mp3, m4a, mp4, ...), folder, quoted pattern, s3:// or - (stdin)"
    parser.add_argument("recordings", nargs="+", help=audio)
    model = "run_dir (its best checkpoint is taken) or export; path, s3:// or hf:// (the small one "
    model += "that comes with the package)"
    parser.add_argument("--model", default=READY, help=model)
    output = "folder or s3:// prefix for <stem>_s1.wav, <stem>_s2.wav, ..., or - (stdout)"
    parser.add_argument("--output", default="separated", help=f"{output} (separated)")
    kind = "of the outputs (wav)"
    formats = windows.FORMATS
    parser.add_argument("--format", choices=formats, default="wav", dest="file_format", help=kind)
    subtype = "of the outputs (24 bits for recordings of more than 16 and quiet outputs, else 16)"
    parser.add_argument("--subtype", choices=formats["wav"], default="", help=subtype)
    channels = "mean of all, a number from 1, or each by itself, in <stem>_c1_s1.wav, ... (mean)"
    parser.add_argument("--channels", default="mean", help=channels)
    stream = "causal models: - in blocks to --output -, as raw samples of this format"
    parser.add_argument("--stream", choices=windows.PCM, help=stream)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    plugins = "package that may define the model (repeat for more)"
    parser.add_argument("--plugins", action="append", default=[], metavar="PACKAGE", help=plugins)
    compiled = "compile the model where it can be: seconds at first, then faster"
    parser.add_argument("--compile", action="store_true", help=compiled)
    again = "replace outputs that are there already"
    parser.add_argument("--overwrite", action="store_true", help=again)
    page = "write OUTPUT/listening.html, a page with players and spectrograms"
    parser.add_argument("--page", action="store_true", help=page)
    for name, text in WINDOW_OPTIONS.items():
        value = getattr(Windows(), name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(value), default=value, help=f"{text} ({value})")
    return parser


def _check_names(stems: Mapping[str, str], output: str, file_format: str, overwrite: bool) -> None:
    """Refuse outputs that would replace a recording or, unless told to, older outputs.

    One stream takes one recording.
    """
    if output == "-":
        if len(stems) > 1:
            raise SeparationError(f"--output - takes one recording, not {len(stems)}")
        return
    folder = output if "://" in output else os.path.realpath(os.path.expanduser(output))
    owners = {os.path.join(folder, stem): recording for recording, stem in stems.items()}

    def owner(place: str) -> str | None:
        """The recording whose output lies at `place`, if any."""
        ending = re.fullmatch(rf"((.+?)(_c\d+)?)_s\d+\.{file_format}", place, re.DOTALL)
        return ending and (owners.get(ending[1]) or owners.get(ending[2]))

    for other in stems:
        if recording := owner(os.path.realpath(os.path.expanduser(other))):
            wrong = f"an output of {recording} would replace the recording {other}"
            raise SeparationError(f"{wrong}: use another --output")
    if overwrite:
        return
    from sepdist import storage  # late, as above

    for below in sorted({os.path.dirname(place) for place in owners}):
        for name in storage.list_names(below):
            if recording := owner(os.path.join(below, name)):
                there = f"{os.path.join(below, name)} is there already, an output of {recording}"
                raise SeparationError(f"{there}: use another --output, or --overwrite")
