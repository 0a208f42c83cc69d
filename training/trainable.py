"""What of a generator learns: which parameters, by the words of `--train`. Knows names of layers, nothing of losses.

Frozen parameters get no gradients and no optimiser state. The discriminator's frozen layers are another matter: they
are buffers (`freeze_layers` of its blocks), as in the family.
"""

import re

import torch

from training.config import TrainChoice


def generator_parameters(G: torch.nn.Module, choice: TrainChoice) -> list[torch.nn.Parameter]:
    """The parameters of G that `choice` lets learn, in G's order; for adapters those that they act on.

    Raises:
        ValueError: the choice freezes every block of the synthesis network.
    """
    if choice.synthesis_from > G.img_resolution:  # type: ignore[operator]
        raise ValueError(
            f"--train {choice.text}: this generator's highest block is {G.img_resolution} pixels, so none would learn; "
            f"freeze-synthesis:R takes at most {G.img_resolution}"
        )
    return [parameter for name, parameter in G.named_parameters() if learns(name, choice)]


def learns(name: str, choice: TrainChoice) -> bool:
    """Whether the generator's parameter called `name` learns."""
    if name.startswith("mapping."):
        return choice.mapping and choice.part == "all"
    if choice.part == "affines":
        return ".affine." in name
    if choice.part == "adapters":
        return name.endswith((".conv0.weight", ".conv1.weight", ".torgb.weight"))
    block = re.match(r"synthesis\.b(\d+)\.", name)
    return block is None or int(block[1]) >= choice.synthesis_from
