"""Convolutions with weights laid out once against torch's own, over sizes that change from call to call."""

import helpers
import pytest
import torch
import torch.nn.functional as F

from torch_utils.ops import packed_conv2d
from torch_utils.ops.packed_conv2d import PackedConv2d


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_numbers_at_every_size(transposed, dtype, packed, monkeypatch) -> None:
    monkeypatch.setattr(packed_conv2d, "has_packed", lambda: packed)
    rng = torch.Generator().manual_seed(0)
    for kernel in (1, 3):
        weight = torch.randn(7, 5, kernel, kernel, generator=rng).to(dtype)
        convolve = PackedConv2d(weight, transposed=transposed)
        for size in ((1, 5, 4, 6), (3, 5, 4, 6), (1, 5, 9, 1), (2, 5, 40, 40)):
            x = torch.randn(size, generator=rng).to(dtype).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                y = convolve.bound(x)(x)
            x, w = x.double(), weight.double()
            exact = F.conv_transpose2d(x, w.transpose(0, 1), stride=2)
            exact = exact if transposed else F.conv2d(x, w, padding=kernel // 2)
            assert y.dtype == dtype
            bound = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float64: 1e-13}[dtype]
            helpers.assert_close(y, exact, bound, f"{kernel} {size}")


def test_this_torch_has_it() -> None:
    """Not promised by torch: if a version drops it, images come slower, and this says so."""
    assert packed_conv2d.has_packed() == torch.backends.mkldnn.is_available()
