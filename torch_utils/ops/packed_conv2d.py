"""Convolutions of inference whose weights are laid out for this processor once instead of at every call.

A convolution library reorders its weights before it starts; with small images that takes longer than the arithmetic.
What `PackedConv2d.bound` gives keeps the reordered weights. Nothing here has a gradient.
"""

from collections.abc import Callable

import torch

from torch_utils import custom_ops
from torch_utils.ops import conv2d_cpu, conv2d_gradfix, epilogue


class PackedConv2d:
    """A convolution of stride 1 and size-keeping padding, or a transposed one of stride 2, with fixed weights.

    Args:
        weight: [O, I, k, k] in the type of the images; not to be changed any more.
        transposed: False: correlation with padding k // 2. True: zero insertion by 2, then a convolution with all
            zeros around that it can use, as `conv_transpose2d` of the exchanged weights with stride 2 and no padding.
    """

    def __init__(self, weight: torch.Tensor, *, transposed: bool) -> None:
        self.weight = weight.transpose(0, 1) if transposed else weight
        self.transposed = transposed
        self.padding = 0 if transposed else weight.shape[2] // 2
        self._prepared: torch.Tensor | None = None

    def bound(self, like: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The convolution of channels-last images [N, I, H, W] of this size and kind, with nothing left to decide."""
        if self._is_ours(like):
            return conv2d_cpu.bound_prepared(*self._ours(), transposed=self.transposed)
        if not self._pays(like):
            if self.transposed:
                return lambda x: conv2d_gradfix.conv_transpose2d(x, self.weight, stride=2)
            return lambda x: conv2d_gradfix.conv2d(x, self.weight, padding=self.padding)
        ops, one, pads, size = torch.ops.mkldnn, [1, 1], [self.padding] * 2, list(like.shape)
        if self.transposed:
            zero, two = [0, 0], [2, 2]
            packed = ops._reorder_convolution_transpose_weight(self.weight, zero, zero, two, one, 1, size)
            run = ops._convolution_transpose_pointwise.default
            return lambda x: run(x, packed, None, zero, zero, two, one, 1, "none", [], "")
        packed = ops._reorder_convolution_weight(self.weight, pads, one, one, 1, size)
        run = ops._convolution_pointwise.default
        return lambda x: run(x, packed, None, pads, one, one, 1, "none", [], "")

    def bound_modulated(self, like: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        """`bound` of images times styles [N, I] at once; None where that takes two steps."""
        return conv2d_cpu.bound_modulated(*self._ours(), transposed=self.transposed) if self._is_ours(like) else None

    def bound_layer(
        self, like: torch.Tensor, act: str, gain: float, clamp: float | None
    ) -> Callable[..., torch.Tensor] | None:
        """`bound_modulated` and `epilogue` at once, of (x, styles, scale, noise, strength, bias); None where not."""
        if self.transposed or act not in epilogue.NATIVE_ACTS or gain <= 0 or not self._is_ours(like):
            return None
        return conv2d_cpu.bound_layer(*self._ours(), *epilogue.native_settings(act, gain, clamp))

    def _ours(self) -> tuple[torch.Tensor, int]:
        """Prepared weights and the number of channels that they give."""
        if self._prepared is None:
            self._prepared = conv2d_cpu.prepare(self.weight, transposed=self.transposed)
        return self._prepared, self.weight.shape[1 if self.transposed else 0]

    def _is_ours(self, x: torch.Tensor) -> bool:
        """Whether the compiled 3x3 convolution beats packed weights."""
        o, c, kernel, _ = self.weight.shape
        return (
            kernel == 3
            and x.device.type == "cpu"
            and conv2d_cpu.prepared_pays(len(x), c, o, x.shape[2], x.shape[3], x.dtype, transposed=self.transposed)
            and custom_ops.selected() == "native"
        )

    def _pays(self, x: torch.Tensor) -> bool:
        return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and has_packed()


def has_packed() -> bool:
    """Whether this torch has the library and offers packed weights; it is not part of what torch promises."""
    names = ("_reorder_convolution_weight", "_reorder_convolution_transpose_weight",
             "_convolution_pointwise", "_convolution_transpose_pointwise")  # fmt: skip
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)
