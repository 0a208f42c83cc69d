"""rosinality's stylegan2-pytorch checkpoints: their tensors under our names, and ours under theirs.

The arithmetic is the same but for the epsilon of the demodulation; no tensor is flipped, transposed or scaled except
the blur kernels, which that code stores multiplied by 4 in its generator.
Source: other-checkpoints.md section 1.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch

from torch_utils.ops import upfirdn2d
from torch_utils.pickle_reader import PickleError, TensorRecord, printable
from training import recognise, state_dict
from training.networks import DEFAULT_FILTER

UPSAMPLE_GAIN = 4  # stored in the generator's blur and upsample kernels
LR_MULTIPLIER = 0.01  # of the mapping; not stored, the only value in use
NUM_CHANNELS = 3
REMEDY = "write another format, or see docs/formats.md"


def parse(root: Any) -> dict[str, Any]:
    """Our networks from the value of a rosinality checkpoint.

    Args:
        root: `Document.root` of a file that `recognise.identify` calls 'rosinality'.

    Returns:
        G, D (None where missing), G_ema and notes, as in `network_pickle.NetworkFile`.

    Raises:
        PickleError: the tensors are not those of a StyleGAN2 with a width that our networks can have.
    """
    found = recognise.state_dicts(root)
    latent_avg = root.get("latent_avg")
    nets: dict[str, Any] = {"G": None, "D": None, "G_ema": None}
    notes: list[str] = []
    for key, state in found.items():
        tensors = state_dict.values(state, f"the rosinality checkpoint's {key}")
        if key == "D":
            nets["D"], _ = state_dict.build_discriminator(discriminator_to_ours(tensors), "D", is_bare=False)
            continue
        ours = generator_to_ours(tensors)
        if isinstance(latent_avg, TensorRecord):
            ours["mapping.w_avg"] = latent_avg.tensor().flatten()
        nets[key], said = state_dict.build_generator(ours, key, is_bare=False)
        notes += [note for note in said if note not in notes]
    if nets["G_ema"] is None:
        if nets["G"] is None:
            raise PickleError("a rosinality checkpoint without a generator; wanted g_ema or g")
        nets["G_ema"], nets["G"] = nets["G"], None
        notes.append(state_dict.NO_MOVING_AVERAGE)
    return {**nets, "notes": tuple(notes)}


def generator_to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of rosinality's Generator.

    Raises:
        PickleError: unknown names or shapes.
    """
    ours = {"synthesis.b4.resample_filter": upfirdn2d.setup_filter(DEFAULT_FILTER)}  # without effect, none there
    for name, tensor in state.items():
        if name == "input.input":
            ours["synthesis.b4.const"] = _shaped(name, tensor, 4)[0]
        elif match := re.fullmatch(r"style\.(\d{1,3})\.(weight|bias)", name):
            ours[f"mapping.fc{int(match[1]) - 1}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"(conv1|convs\.(\d{1,2}))\.(.+)", name):
            _styled_conv(ours, _layer(match[2]), match[3], name, tensor)
        elif match := re.fullmatch(r"to_rgb(1|s\.(\d{1,2}))\.(.+)", name):
            _to_rgb(ours, _block(match[2]), match[3], name, tensor)
        elif match := re.fullmatch(r"noises\.noise_(\d{1,2})", name):
            index = int(match[1])
            layer = _layer(str(index - 1) if index else None)
            ours[f"{layer}.noise_const"] = _shaped(name, tensor, 4)[0, 0]
        else:
            raise PickleError(f"rosinality's generator has no {printable(name)!r}; another code base wrote this file")
    return ours


def discriminator_to_ours(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of rosinality's Discriminator.

    Raises:
        PickleError: unknown names or shapes.
    """
    numbers = [int(match[1]) for name in state if (match := re.match(r"convs\.(\d{1,2})\.", name))]
    top = 4 << max(numbers, default=0)
    last = {
        "final_conv.0.weight": "b4.conv.weight",
        "final_conv.1.bias": "b4.conv.bias",
        "final_linear.0.weight": "b4.fc.weight",
        "final_linear.0.bias": "b4.fc.bias",
        "final_linear.1.weight": "b4.out.weight",
        "final_linear.1.bias": "b4.out.bias",
        "convs.0.0.weight": f"b{top}.fromrgb.weight",
        "convs.0.1.bias": f"b{top}.fromrgb.bias",
    }
    ours = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"convs\.(\d{1,2})\.(.+)", name)
        if name in last:
            ours[last[name]] = tensor
        elif match and match[2] in _D_NAMES:
            ours[f"b{(top << 1) >> int(match[1])}.{_D_NAMES[match[2]]}"] = tensor
        else:
            raise PickleError(f"rosinality's discriminator has no {printable(name)!r}; another code base wrote it")
    return ours


_D_NAMES = {
    "conv1.0.weight": "conv0.weight",
    "conv1.1.bias": "conv0.bias",
    "conv2.0.kernel": "conv1.resample_filter",
    "conv2.1.weight": "conv1.weight",
    "conv2.2.bias": "conv1.bias",
    "skip.0.kernel": "skip.resample_filter",
    "skip.1.weight": "skip.weight",
}
_CONV_NAMES = {"conv.modulation.weight": "affine.weight", "conv.modulation.bias": "affine.bias"}


def _layer(index: "str | None") -> str:
    """Our name of `conv1` (None) or of `convs.{index}`."""
    if index is None:
        return "synthesis.b4.conv1"
    return f"synthesis.b{8 << (int(index) // 2)}.conv{int(index) % 2}"


def _block(index: "str | None") -> str:
    return "synthesis.b4" if index is None else f"synthesis.b{8 << int(index)}"


def _styled_conv(ours: dict, layer: str, part: str, name: str, tensor: torch.Tensor) -> None:
    if part == "conv.weight":
        ours[f"{layer}.weight"] = _shaped(name, tensor, 5)[0]
    elif part in _CONV_NAMES:
        ours[f"{layer}.{_CONV_NAMES[part]}"] = tensor
    elif part == "noise.weight":
        ours[f"{layer}.noise_strength"] = _shaped(name, tensor, 1)[0]
    elif part == "activate.bias":
        ours[f"{layer}.bias"] = tensor
    elif part == "conv.blur.kernel":
        ours[f"{layer}.resample_filter"] = _kernel(name, tensor) / UPSAMPLE_GAIN
    else:
        raise PickleError(f"rosinality's generator has no {printable(name)!r}; another code base wrote this file")


def _to_rgb(ours: dict, block: str, part: str, name: str, tensor: torch.Tensor) -> None:
    if part == "conv.weight":
        ours[f"{block}.torgb.weight"] = _shaped(name, tensor, 5)[0]
    elif part in _CONV_NAMES:
        ours[f"{block}.torgb.{_CONV_NAMES[part]}"] = tensor
    elif part == "bias":
        ours[f"{block}.torgb.bias"] = tensor.flatten()
    elif part == "upsample.kernel":
        ours[f"{block}.resample_filter"] = _kernel(name, tensor) / UPSAMPLE_GAIN
    else:
        raise PickleError(f"rosinality's generator has no {printable(name)!r}; another code base wrote this file")


def _shaped(name: str, tensor: torch.Tensor, num_dims: int) -> torch.Tensor:
    if tensor.ndim != num_dims or tensor.shape[0] != 1 or (name.startswith("noises.") and tensor.shape[1] != 1):
        raise PickleError(f"{name!r} has shape {list(tensor.shape)}, which rosinality's code does not write; damaged")
    return tensor


def _kernel(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tuple(tensor.shape) != (4, 4):
        raise PickleError(f"{name!r} has shape {list(tensor.shape)}; only filters of 4 taps fit our networks")
    return tensor
