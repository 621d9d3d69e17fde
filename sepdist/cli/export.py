"""Write a separator as one file that runs without sepdist, at any length and batch size.

    sepdist export runs/a --format torch --output model.pt2
    sepdist export hf://org/name --format onnx --output model.onnx

The program takes a mixture [B, T] at the model's rate and gives estimates [B, S, T]. Its rate and
the fewest samples that it takes stand in the file (sepdist.json, or ONNX's metadata): pad a shorter
mixture with zeros. torch.export.load and onnxruntime read it. A model that cannot be written is
refused with the reason.
"""

import argparse

from sepdist.console import user_console


def main() -> None:
    """Export one model."""
    given = _parser().parse_args()
    with user_console() as console:
        from sepdist import slots
        from sepdist.inference.tracing import write

        slots.use_plugins(given.plugins)
        facts = write(given.model, given.output, given.format)
        console.print(", ".join(f"{key}={value}" for key, value in facts.items()))
        print(given.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="run_dir, export or hf://; a path or s3://")
    parser.add_argument("--format", choices=("torch", "onnx"), required=True)
    parser.add_argument("--output", required=True, help="a new file: .pt2 or .onnx")
    parser.add_argument("--plugins", action="append", default=[], metavar="PACKAGE")
    return parser
