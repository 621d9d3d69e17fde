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
from sepdist.inference.stitching import SeparationError, Windows, output_names


def main() -> int:
    """Separate each recording; where one fails, name it, go on and return exit status 1."""
    given = _parser().parse_args()
    status = 0
    with user_console(RuntimeError) as console:  # RuntimeError: torch lacks the device
        windows = Windows(given.window_seconds, given.overlap_seconds, given.batch_size)
        _check_names(given.recordings, given.output, given.format)
        import torch  # only now, when the command line is right

        from sepdist.allocator import keep_freed_memory
        from sepdist.inference.export import load_separator
        from sepdist.inference.separator import separate_file

        device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
        export = load_separator(given.model)
        model = export.model.to(device)
        keep_freed_memory()
    with user_console() as console:
        for recording in given.recordings:
            try:
                with progress_bar(console, PurePosixPath(recording).name) as advance:
                    result = separate_file(
                        model,
                        export.sample_rate,
                        recording,
                        given.output,
                        windows=windows,
                        file_format=given.format,
                        device=device,
                        progress=advance,
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
    defaults = Windows()
    parser = argparse.ArgumentParser(
        prog="sepdist separate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    recording = "audio file (wav, flac, ogg, ...) or s3://"
    add("recordings", nargs="+", metavar="RECORDING", help=recording)
    model = "run_dir (its best checkpoint is taken) or export; path or s3://"
    add("--model", required=True, help=model)
    output = "folder or s3:// prefix for <stem>_s1.wav, <stem>_s2.wav, ..."
    add("--output", required=True, help=output)
    add("--format", choices=("flac", "wav"), default="wav", help="of the outputs (%(default)s)")
    window = "length of the model's input (%(default)s)"
    add("--window-seconds", type=float, default=defaults.window_seconds, help=window)
    overlap = "shared by neighbours, at most half a window; longer than the pauses in the speech, "
    overlap += "it keeps the speakers apart (%(default)s)"
    add("--overlap-seconds", type=float, default=defaults.overlap_seconds, help=overlap)
    batch = "windows at once; memory grows with it (%(default)s)"
    add("--batch-size", type=int, default=defaults.batch_size, help=batch)
    add("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    return parser


def _check_names(recordings: list[str], output: str, file_format: str) -> None:
    """Refuse two recordings with the same outputs, and outputs that would replace a recording."""
    stems: dict[str, str] = {}
    places = {storage.absolute(name) for name in recordings}
    for recording in recordings:
        stem = PurePosixPath(recording).stem
        if stem in stems:
            raise SeparationError(
                f"{stems[stem]} and {recording} would both be written as {stem}_s1.{file_format}"
            )
        stems[stem] = recording
        for name in output_names(recording, 8, file_format):
            if storage.absolute(storage.join(output, name)) in places:
                raise SeparationError(
                    f"an output of {recording} would replace the recording {name}: "
                    "use another --output"
                )
