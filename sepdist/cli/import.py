"""Turn a checkpoint of Asteroid, SpeechBrain or torchaudio into an export of sepdist.

    sepdist import asteroid best_model.pth --output imported
    sepdist import asteroid hf://org/name --output imported
    sepdist import speechbrain hf://speechbrain/sepformer-wsj02mix --output imported
    sepdist import torchaudio model.pt num_repeats=3 mask_activation=relu sample_rate=8000 \\
        --output imported

Conv-TasNet, DPRNN and DPTNet come from Asteroid (what `serialize` saved), SepFormer from
SpeechBrain (a folder with hyperparams.yaml and encoder, masknet and decoder.ckpt), Conv-TasNet from
torchaudio (its state_dict). The estimates are those of the original code at any length. Nothing in
a checkpoint is executed, and what cannot be mapped is refused by name. The result can be evaluated,
used by `sepdist separate` and fine-tuned (init.weights=imported); keep the licence it came with.
"""

import argparse

from sepdist.console import user_console


def main() -> None:
    """Import one checkpoint."""
    given = _parser().parse_intermixed_args()
    with user_console() as console:
        from sepdist.config import ConfigError, parse_plain
        from sepdist.inference.importing import import_model

        arguments = {}
        for word in given.arguments:
            key, equals, value = word.partition("=")
            if not equals:
                raise ConfigError(f"cannot read {word!r}: give KEY=VALUE, as sample_rate=8000")
            arguments[key] = parse_plain(value)
        card = import_model(given.origin, given.checkpoint, given.output, arguments)
        kind = card["model"]["_target_"].rpartition(".")[2]
        console.print(f"{kind} at {card['sample_rate']} Hz")
        print(given.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("origin", choices=("asteroid", "speechbrain", "torchaudio"))
    parser.add_argument("checkpoint", help="file, folder or hf://org/name[@revision]")
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="KEY=VALUE",
        help="what the checkpoint does not tell: sample_rate, or an argument of our model",
    )
    parser.add_argument("--output", required=True, help="a new folder, or an s3:// prefix")
    return parser
