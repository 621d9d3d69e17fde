"""Activation checkpointing: a model's blocks keep their inputs and run again for the gradient."""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from sepdist.config import ConfigError


def recompute_blocks(model: nn.Module) -> None:
    """Wrap the forward pass of each of the `outermost` blocks, in place; ConfigError if none is."""
    if not (blocks := outermost(model)):
        name, wrong = type(model).__name__, "keeps no blocks in an nn.ModuleList; set it to false"
        raise ConfigError(f"engine.checkpoint_activations=true: {name} {wrong}")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore


def outermost(module: nn.Module, inside: bool = False) -> list[nn.Module]:
    """The members of the outermost nn.ModuleLists, and nn.Sequentials of one class, in `module`."""
    if inside and not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [module]
    inside = inside or isinstance(module, nn.ModuleList)
    if isinstance(module, nn.Sequential) and len(module) > 1:
        inside = len({type(one) for one in module}) == 1
    return [block for child in module.children() for block in outermost(child, inside)]
