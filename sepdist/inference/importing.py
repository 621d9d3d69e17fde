"""Turn checkpoints of Asteroid, SpeechBrain and torchaudio into models of ours.

Their files are read as data: tensors and plain values, never code. The estimates are those of the
original code at any length, as imported models take its padding. What has no counterpart here is
refused by its name and value.
"""

import glob
import hashlib
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from sepdist import hub, storage
from sepdist.inference.export import build_stored, check_new
from sepdist.reporting import to_json
from sepdist.training.checkpoint import CheckpointError
from sepdist.training.handoff import MAX_BYTES, load_weights, parse_card

Node = dict[str, Any]
State = dict[str, Tensor]

TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
RULES: dict[str, dict[str, str]] = TABLES["rules"]
GAINS = {"weight": "gain", "gamma": "gain", "bias": "shift", "beta": "shift"}


def convert(state: Mapping[str, Tensor], table: Mapping[str, str]) -> State:
    """A published model's tensors by our names; CheckpointError for one without a rule."""
    halves: dict[str, dict[str, Tensor]] = {}
    rules = []
    for theirs, ours in table.items():
        pattern = re.escape(theirs).replace("%", r"(\d+)").replace("@", "(intra|inter)")
        rules.append((re.compile(pattern + r"(?:[._](\w+))?"), ours))
    for theirs, tensor in state.items():
        matches = [(found, ours) for one, ours in rules if (found := one.fullmatch(theirs))]
        if len(matches) != 1:
            raise CheckpointError(f"the parameter {theirs} has no counterpart in our model")
        (match, ours), *_ = matches
        *groups, end = match.groups()
        for group in groups:
            ours = ours.replace("%" if group.isdigit() else "@", group, 1)
        name, _, half = ours.replace("*", end or "").partition("#")
        tensor = tensor.flatten(1) if tensor.ndim > 2 else tensor
        if "~" in name:
            name, tensor = name.replace("~", GAINS.get(end, "")), tensor.flatten()
        if name.endswith("^"):
            name, tensor = name[:-1], tensor.T
        halves.setdefault(name, {})[half] = tensor.detach().float()
    halves.pop("-", None)
    return {name: torch.cat([one[key] for key in sorted(one)]) for name, one in halves.items()}


def check_values(where: str, given: Node, allowed: Node, sizes: Any = ()) -> None:
    """Raise CheckpointError for a value that our model cannot have, or a key that is not known."""
    for key, value in given.items():
        plain = value is None or isinstance(value, int | float | str)
        if not plain or (key not in sizes and value not in allowed.get(key, ())):
            only = " or ".join(map(repr, allowed.get(key, ()))) or "no such argument"
            raise CheckpointError(f"{where}: {key}={value!r} cannot be mapped: we have {only}")


def read_tensors(path: str) -> Any:
    """The content of a file of torch.save, if it holds tensors and plain values only."""
    try:
        with torch.serialization.safe_globals([torch.torch_version.TorchVersion]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        what = "not a file of torch.save with tensors and plain values only; nothing in it was run"
        raise CheckpointError(f"{path}: {what} ({reason})") from error


def _state(path: str, value: Any) -> State:
    if not isinstance(value, Mapping) or not all(isinstance(x, Tensor) for x in value.values()):
        raise CheckpointError(f"{path}: no state_dict, which maps names to tensors")
    if odd := [key for key, x in value.items() if not isinstance(key, str) or not x.ndim]:
        raise CheckpointError(f"{path}: {odd[0]!r} is no name of a parameter with an axis")
    return dict(value)


def read_asteroid(path: str, given: Node) -> tuple[Node, State, dict[str, str]]:
    """Our config, their tensors and the rules for them, of what Asteroid's `serialize` saved."""
    if os.path.isdir(path):
        files = [one for end in ("pth", "bin") for one in glob.glob(f"{glob.escape(path)}/*.{end}")]
        if len(files) != 1:
            raise CheckpointError(f"{path}: {len(files)} files *.pth or *.bin; name one")
        path = files[0]
    saved = read_tensors(path)
    if not isinstance(saved, Mapping) or not isinstance(saved.get("model_args"), Mapping):
        what = "a model of Asteroid has model_name, model_args and state_dict (best_model.pth)"
        raise CheckpointError(f"{path}: {what}, not a Lightning checkpoint")
    name, args = saved.get("model_name"), dict(saved["model_args"])
    if not isinstance(name, str) or name not in TABLES["asteroid"]:
        known = ", ".join(TABLES["asteroid"])
        raise CheckpointError(f"{path}: model_name={name!r}: we have {known}")
    kind, chunk = TABLES["asteroid"][name], args.get("chunk_size")
    target, names = kind["target"], kind["sizes"]
    allowed = dict.fromkeys(("in_chan", "out_chan"), (None, args.get("n_filters")))
    allowed |= {"hop_size": (None, chunk // 2 if isinstance(chunk, int) else None)}
    allowed |= TABLES["values"] | {"encoder_activation": kind["activations"]}
    check_values(path, args, allowed, {*names, "sample_rate", "dropout"} - {"mask_act"})
    if not args.get("skip_chan", 1):
        raise CheckpointError(f"{path}: skip_chan={args['skip_chan']} cannot be mapped")
    node = {ours: args[theirs] for theirs, ours in names.items() if args.get(theirs)}
    node |= {"sample_rate": args["sample_rate"]} if args.get("sample_rate") else {}
    if "stride" not in node and isinstance(args.get("kernel_size"), int):
        node["stride"] = args["kernel_size"] // 2
    missing = dict.fromkeys(names.values())
    node = missing | node | {"_target_": f"sepdist.models.{target}", "padding": "none"}
    return node, _state(path, saved.get("state_dict")), RULES[target.partition(".")[0]]


def read_torchaudio(path: str, given: Node) -> tuple[Node, State, dict[str, str]]:
    """The same of torchaudio's ConvTasNet, whose state_dict shows all sizes but three."""
    state, layers = _state(path, read_tensors(path)), "mask_generator.conv_layers."
    try:
        num_filters, _, kernel_size = state["encoder.weight"].shape
        num_hidden, num_features, _ = state[f"{layers}0.conv_layers.0.weight"].shape
        num_taps = state[f"{layers}0.conv_layers.3.weight"].shape[2]
        num_outputs = state["mask_generator.output_conv.weight"].shape[0]
        count = 1 + max(int(one.split(".")[2]) for one in state if one.startswith(layers))
    except (LookupError, ValueError) as error:
        raise CheckpointError(f"{path}: no state_dict of torchaudio's ConvTasNet") from error
    if num_taps != 3:  # torchaudio pads for three taps, whatever there are
        raise CheckpointError(f"{path}: msk_kernel_size={num_taps} cannot be mapped: we have 3")
    last = f"{layers}{count - 1}.res_out."  # which torchaudio leaves out, as nothing follows
    state.setdefault(f"{last}weight", torch.zeros(num_features, num_hidden, 1))
    state.setdefault(f"{last}bias", torch.zeros(num_features))
    repeats = given.get("num_repeats") or 1
    if not isinstance(repeats, int) or count % repeats:
        raise CheckpointError(f"num_repeats={repeats} does not divide the {count} blocks of {path}")
    node: Node = {"_target_": "sepdist.models.conv_tasnet.ConvTasNet", "padding": "both"}
    node |= {"num_filters": num_filters, "kernel_size": kernel_size, "stride": kernel_size // 2}
    node |= {"num_bottleneck": num_features, "num_hidden": num_hidden, "num_skip": num_features}
    node |= {"num_speakers": num_outputs // num_filters, "num_blocks": count // repeats}
    node |= {"num_repeats": None, "mask_activation": None}
    return node, state, RULES["torchaudio"]


class _TaggedLoader(yaml.SafeLoader):
    """HyperPyYAML as data: a mapping keeps its tag under "!", a scalar becomes "!tag value"."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # a few can stand for terabytes
            raise yaml.YAMLError("it has an alias")
        return super().compose_node(parent, index)


def _keep_tag(loader: yaml.SafeLoader, tag: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {"!": tag} | loader.construct_mapping(node, deep=True)
    return f"!{tag} {node.value}" if isinstance(node, yaml.ScalarNode) else f"!{tag}"


_TaggedLoader.add_multi_constructor("!", _keep_tag)
_KINDS = "speechbrain.lobes.models.dual_path"


def read_speechbrain(folder: str, given: Node) -> tuple[Node, State, dict[str, str]]:
    """The same of a folder of SpeechBrain: hyperparams.yaml, encoder, masknet and decoder.ckpt."""
    path = storage.join(folder, "hyperparams.yaml")
    try:
        top = yaml.load(storage.read_bytes(path)[:MAX_BYTES], _TaggedLoader)
        modules = top["modules"]
    except (yaml.YAMLError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise CheckpointError(f"{path}: it does not describe a model ({error})") from error

    def value(one: Any) -> Any:
        for _ in range(9):  # a reference may name another one
            match = re.fullmatch(r"!ref <(\w+)>", one) if isinstance(one, str) else None
            one = top.get(match[1]) if match else one
        if isinstance(one, str) and one.startswith("!"):  # nothing is computed or called
            raise CheckpointError(f"{path}: write the value of {one} instead")
        return one

    def part(one: Any, kind: str, **computed: Any) -> Node:
        """The arguments of a module; those that follow from others must have `computed` values."""
        found, known = value(one), TABLES["speechbrain"][kind]
        tag = found.get("!", "") if isinstance(found, dict) else found
        if tag != f"new:{_KINDS}.{kind}":
            raise CheckpointError(f"{path}: {tag!r} cannot be mapped: a {_KINDS}.{kind} is wanted")
        own = {key: value(inner) for key, inner in found.items() if key != "!"}
        args = known["defaults"] | own
        plain = {key: inner for key, inner in args.items() if key not in paths}
        allowed = known["values"] | {key: (inner,) for key, inner in computed.items()}
        check_values(f"{path}: {kind}", plain, allowed, known["sizes"])
        return args

    modules, paths = value(modules), ("intra_model", "inter_model")
    modules = modules if isinstance(modules, dict) else {}
    encoder = part(modules.get("encoder"), "Encoder")
    width, kernel = encoder.get("out_channels", 64), encoder.get("kernel_size", 2)
    stride = kernel // 2 if isinstance(kernel, int) else None
    widths = {"in_channels": width, "out_channels": width}
    masknet = part(modules.get("masknet"), "Dual_Path_Model", **widths)
    part(modules.get("decoder"), "Decoder", in_channels=width, kernel_size=kernel, stride=stride)
    intra, inter = (part(masknet.get(one), "SBTransformerBlock", d_model=width) for one in paths)
    same = {key: (intra.get(key),) for key in ("num_layers", "nhead", "d_ffn")}
    check_values(f"{path}: inter_model", {key: inter.get(key) for key in same}, same)
    node: Node = {"_target_": "sepdist.models.sepformer.SepFormer", "padding": "none"}
    node |= {"num_filters": width, "kernel_size": kernel, "stride": stride}
    node |= {"num_speakers": masknet.get("num_spks", 2), "chunk_size": masknet.get("K", 200)}
    node |= {"num_blocks": masknet.get("num_layers", 1), "num_hidden": intra["d_ffn"]}
    node |= {"num_layers": intra.get("num_layers"), "num_heads": intra.get("nhead")}
    state: State = {}
    for name in ("encoder", "masknet", "decoder"):
        file = os.path.join(folder, f"{name}.ckpt")
        state |= {f"{name}.{key}": x for key, x in _state(file, read_tensors(file)).items()}
    return node | {"sample_rate": value(top.get("sample_rate"))}, state, RULES["sepformer"]


READERS = {
    "asteroid": read_asteroid,
    "speechbrain": read_speechbrain,
    "torchaudio": read_torchaudio,
}


def import_model(origin: str, checkpoint: str, output: str, given: Node) -> Node:
    """Write the export `output` of a published model; returns its model.yaml.

    `given` are arguments of our model, and its sample_rate, that the checkpoint does not tell.
    CheckpointError if the model cannot be mapped, or `output` holds something.
    """
    check_new(output)
    place = hub.local(os.path.expanduser(checkpoint), hub.FOREIGN)
    storage.size(place)
    node, state, rules = READERS[origin](place, given)
    if changed := [key for key in given if node.get(key) is not None]:
        key = changed[0]
        raise CheckpointError(f"{key}={given[key]}: {checkpoint} says {key}={node[key]} itself")
    rate = (node := {"sample_rate": None} | node | given).pop("sample_rate")
    missing = {"sample_rate": rate} | node
    if unknown := [f"{key}=..." for key, value in missing.items() if value is None]:
        raise CheckpointError(
            f"{checkpoint} does not tell {', '.join(unknown)}: give it at the end"
        )
    rate = int(rate) if isinstance(rate, float) and rate.is_integer() else rate
    data = yaml.safe_dump({"model": node, "sample_rate": rate}, sort_keys=False).encode()
    card, weights = parse_card(data, output), convert(state, rules)
    model = build_stored(card["model"], weights, checkpoint)
    load_weights(model, weights, source=checkpoint)
    tensors = safetensors.torch.save(weights)
    lineage = {"run": f"{origin}: {os.path.basename(checkpoint.rstrip('/'))}", "step": 0}
    lineage |= {"sha256": hashlib.sha256(tensors).hexdigest(), "imported_from": origin}
    files = {"model.safetensors": tensors, "lineage.json": to_json(lineage, indent=1).encode()}
    for name, content in (files | {"model.yaml": data}).items():
        storage.put_bytes(storage.join(output, name), content)
    return card
