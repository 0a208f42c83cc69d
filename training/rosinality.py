"""rosinality's stylegan2-pytorch checkpoints: their tensors under our names, and ours under theirs.

The arithmetic is the same but for the epsilon of the demodulation; no tensor is flipped, transposed or scaled except
the blur kernels, which that code stores multiplied by 4 in its generator.
Source: other-checkpoints.md section 1.
"""

import io
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from dnnlib.util import atomic_file
from torch_utils.ops import upfirdn2d
from torch_utils.pickle_reader import PickleError, TensorRecord, printable
from training import network_pickle, recognise, state_dict
from training.networks import DEFAULT_FILTER

UPSAMPLE_GAIN = 4  # stored in the generator's blur and upsample kernels
LR_MULTIPLIER = 0.01  # of the mapping; not stored, the only value in use
NUM_CHANNELS = 3
LAST_WIDE = 32  # pixels: up to here every layer has 512 channels
DEFAULT_MULTIPLIER = 2  # of that code's --channel_multiplier
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


def save(
    path: "str | os.PathLike",
    *,
    G_ema: torch.nn.Module,
    G: "torch.nn.Module | None" = None,
    D: "torch.nn.Module | None" = None,
    any_channels: bool = False,
) -> tuple[str, ...]:
    """Write a checkpoint that rosinality's code opens, atomically: g_ema, latent_avg, then g and d if given.

    Args:
        path: file to write.
        G_ema, G, D: networks.
        any_channels: also write channel counts that its table does not have, for code with another table.

    Returns:
        Sentences on what that code has no place for, or needs to open the file.

    Raises:
        ValueError: networks that it cannot have; one line with the reason.
    """
    nets: dict[str, Any] = {"g_ema": G_ema, "g": G, "d": D}
    for key, net in nets.items():
        reasons = [] if net is None else _impossible_d(net) if key == "d" else _impossible_g(net)
        if reasons:
            raise ValueError(f"rosinality's code has no such networks: {'; '.join(reasons)}; {REMEDY}")
    multiplier = _channel_multiplier(nets)
    if multiplier is None and not any_channels:
        raise ValueError(
            f"rosinality's code has no such networks: its table of channels does not have {_listed(G_ema)}; "
            f"--any-channels writes them for code with another table; {REMEDY}"
        )
    content: dict[str, Any] = {"g_ema": generator_to_theirs(G_ema), "latent_avg": nets["g_ema"].mapping.w_avg.clone()}
    if G is not None:
        content["g"] = generator_to_theirs(G)
    if D is not None:
        content["d"] = discriminator_to_theirs(D)
    buffer = io.BytesIO()  # named alike whatever the file is called, so that equal content gives equal bytes
    torch.save(content, buffer)
    with atomic_file(path) as stream:
        stream.write(buffer.getvalue())
    return _notes(nets, multiplier)


def generator_to_theirs(G: torch.nn.Module) -> "OrderedDict[str, torch.Tensor]":
    """The state dict of rosinality's Generator, in its order; the inverse of `generator_to_ours`."""
    ours = _state(G)
    theirs: OrderedDict[str, torch.Tensor] = OrderedDict()
    resolutions: list[int] = list(G.synthesis.block_resolutions)  # type: ignore[arg-type, union-attr]
    for index in range(sum(re.fullmatch(r"mapping\.fc\d+\.weight", name) is not None for name in ours)):
        for part in ("weight", "bias"):
            theirs[f"style.{index + 1}.{part}"] = ours[f"mapping.fc{index}.{part}"]
    theirs["input.input"] = ours["synthesis.b4.const"][None]
    _styled_conv_to_theirs(theirs, ours, "conv1", "synthesis.b4.conv1")
    _to_rgb_to_theirs(theirs, ours, "to_rgb1", "synthesis.b4")
    for index, res in enumerate(resolutions[1:]):
        for layer in (0, 1):
            _styled_conv_to_theirs(theirs, ours, f"convs.{2 * index + layer}", f"synthesis.b{res}.conv{layer}")
    for index, res in enumerate(resolutions[1:]):
        _to_rgb_to_theirs(theirs, ours, f"to_rgbs.{index}", f"synthesis.b{res}")
    layers = [f"synthesis.b{res}.conv{layer}" for res in resolutions for layer in (0, 1)][1:]
    for index, name in enumerate(layers):
        theirs[f"noises.noise_{index}"] = ours[f"{name}.noise_const"][None, None]
    return theirs


def discriminator_to_theirs(D: torch.nn.Module) -> "OrderedDict[str, torch.Tensor]":
    """The state dict of rosinality's Discriminator, in its order; the inverse of `discriminator_to_ours`."""
    ours = _state(D)
    theirs: OrderedDict[str, torch.Tensor] = OrderedDict()
    top: int = D.img_resolution  # type: ignore[assignment]
    theirs["convs.0.0.weight"] = ours[f"b{top}.fromrgb.weight"]
    theirs["convs.0.1.bias"] = ours[f"b{top}.fromrgb.bias"]
    for index, res in enumerate(D.block_resolutions, start=1):  # type: ignore[arg-type, var-annotated]
        for name, own in _D_NAMES.items():
            theirs[f"convs.{index}.{name}"] = ours[f"b{res}.{own}"]
    for name, own in _D_LAST.items():
        theirs[name] = ours[own]
    return theirs


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
    first = {"convs.0.0.weight": f"b{top}.fromrgb.weight", "convs.0.1.bias": f"b{top}.fromrgb.bias"}
    last = {**_D_LAST, **first}
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


_D_LAST = {
    "final_conv.0.weight": "b4.conv.weight",
    "final_conv.1.bias": "b4.conv.bias",
    "final_linear.0.weight": "b4.fc.weight",
    "final_linear.0.bias": "b4.fc.bias",
    "final_linear.1.weight": "b4.out.weight",
    "final_linear.1.bias": "b4.out.bias",
}
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


def _state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Fresh float32 copies of all parameters and buffers, contiguous."""
    named = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    return {name: tensor.detach().to("cpu", torch.float32).contiguous().clone() for name, tensor in named.items()}


def _styled_conv_to_theirs(theirs: dict, ours: dict, name: str, layer: str) -> None:
    theirs[f"{name}.conv.weight"] = ours[f"{layer}.weight"][None]
    if layer.endswith("conv0"):
        theirs[f"{name}.conv.blur.kernel"] = ours[f"{layer}.resample_filter"] * UPSAMPLE_GAIN
    for part, own in _CONV_NAMES.items():
        theirs[f"{name}.{part}"] = ours[f"{layer}.{own}"]
    theirs[f"{name}.noise.weight"] = ours[f"{layer}.noise_strength"][None]
    theirs[f"{name}.activate.bias"] = ours[f"{layer}.bias"]


def _to_rgb_to_theirs(theirs: dict, ours: dict, name: str, block: str) -> None:
    theirs[f"{name}.bias"] = ours[f"{block}.torgb.bias"].reshape(1, -1, 1, 1)
    if name != "to_rgb1":
        theirs[f"{name}.upsample.kernel"] = ours[f"{block}.resample_filter"] * UPSAMPLE_GAIN
    theirs[f"{name}.conv.weight"] = ours[f"{block}.torgb.weight"][None]
    for part, own in _CONV_NAMES.items():
        theirs[f"{name}.{part}"] = ours[f"{block}.torgb.{own}"]


def _impossible_g(G: Any) -> list[str]:
    """Why rosinality's Generator cannot be this one."""
    kwargs = network_pickle.keyword_settings(G)
    mapping, synthesis = kwargs.get("mapping_kwargs") or {}, kwargs.get("synthesis_kwargs") or {}
    reasons = _impossible_common(G)
    if G.z_dim != G.w_dim or mapping.get("layer_features") not in (None, G.w_dim):
        reasons.append("z, w and the mapping's layers differ in width")
    if mapping.get("lr_multiplier", LR_MULTIPLIER) != LR_MULTIPLIER:
        reasons.append(f"the mapping's learning-rate multiplier is not {LR_MULTIPLIER}")
    if mapping.get("activation", "lrelu") != "lrelu" or synthesis.get("activation", "lrelu") != "lrelu":
        reasons.append("the activation is not lrelu")
    if synthesis.get("architecture", "skip") != "skip":
        reasons.append(f"the generator's architecture is {synthesis['architecture']}, not skip")
    if synthesis.get("use_noise", True) is not True or synthesis.get("kernel_size", 3) != 3:
        reasons.append("its layers have no noise or no 3x3 kernels")
    return reasons


def _impossible_d(D: Any) -> list[str]:
    """Why rosinality's Discriminator cannot be this one."""
    kwargs = network_pickle.keyword_settings(D)
    block, epilogue = kwargs.get("block_kwargs") or {}, kwargs.get("epilogue_kwargs") or {}
    reasons = _impossible_common(D)
    if kwargs.get("architecture", "resnet") != "resnet":
        reasons.append(f"the discriminator's architecture is {kwargs['architecture']}, not resnet")
    if block.get("activation", "lrelu") != "lrelu" or epilogue.get("activation", "lrelu") != "lrelu":
        reasons.append("the activation is not lrelu")
    if (epilogue.get("mbstd_group_size", 4), epilogue.get("mbstd_num_channels", 1)) != (4, 1):
        reasons.append("the minibatch standard deviation is not over groups of 4 in 1 channel")
    return reasons


def _impossible_common(net: Any) -> list[str]:
    reasons = []
    if net.c_dim:
        reasons.append(f"it knows {net.c_dim} classes")
    if net.img_channels != NUM_CHANNELS:
        reasons.append(f"images have {net.img_channels} channels, not {NUM_CHANNELS}")
    filters = [t for name, t in net.named_buffers() if name.endswith("resample_filter")]
    if any(tuple(kernel.shape) != (4, 4) for kernel in filters):
        reasons.append("a filter has not 4 taps")
    return reasons


def _notes(nets: dict[str, Any], multiplier: "int | None") -> tuple[str, ...]:
    """What gets lost or needs care on the other side."""
    notes = []
    if any(getattr(module, "conv_clamp", None) is not None for net in nets.values() if net for module in net.modules()):
        notes.append("rosinality's code does not clamp: images differ where the clamp binds")
    if any(getattr(module, "use_fp16", False) for net in nets.values() if net for module in net.modules()):
        notes.append("rosinality's code computes in float32 throughout")
    if multiplier is None:
        notes.append(f"rosinality's table of channels needs to be {_listed(nets['g_ema'])} to open this file")
    elif multiplier != DEFAULT_MULTIPLIER:
        notes.append(f"rosinality's code opens it with --channel_multiplier {multiplier}")
    return tuple(notes)


def _channel_multiplier(nets: dict[str, Any]) -> "int | None":
    """The m of rosinality's table, 512 up to 32 pixels and 16384 m / r above, that gives all widths; None without one.

    Source: other-checkpoints.md 1.2.
    """
    widths = [pair for net in nets.values() if net is not None for pair in _widths(net).items()]
    large = {count * res / 16384 for res, count in widths if res > LAST_WIDE}
    if any(count != 512 for res, count in widths if res <= LAST_WIDE) or len(large) > 1:
        return None
    multiplier = large.pop() if large else DEFAULT_MULTIPLIER
    return int(multiplier) if multiplier >= 1 and multiplier == int(multiplier) else None


def _widths(net: Any) -> dict[int, int]:
    """Channels by resolution."""
    if hasattr(net, "synthesis"):
        return {res: len(getattr(net.synthesis, f"b{res}").conv1.weight) for res in net.synthesis.block_resolutions}
    widths = {res: getattr(net, f"b{res}").conv0.weight.shape[1] for res in net.block_resolutions}
    return {**widths, 4: len(net.b4.conv.weight)}


def _listed(G: Any) -> str:
    return "{" + ", ".join(f"{res}: {count}" for res, count in _widths(G).items()) + "}"
