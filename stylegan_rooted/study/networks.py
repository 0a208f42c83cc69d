"""Small classifiers for the studies, in plain torch: fully connected, residual convolutional, and a vision transformer.

Images come as float32 [N, C, R, R] in [0, 1]; logits go out as [N, classes]. Weights are drawn from torch's generator.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

MLP_WIDTH = 128
CONV_WIDTH, CONV_GRID, CONV_GROUPS = 16, 8, 4
VIT_WIDTH, VIT_GRID, VIT_HEADS, VIT_DEPTH = 32, 4, 2, 2


class Mlp(nn.Sequential):
    """Two hidden layers of rectified units."""

    def __init__(self, num_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(num_channels * resolution**2, MLP_WIDTH),
            nn.ReLU(),
            nn.Linear(MLP_WIDTH, MLP_WIDTH),
            nn.ReLU(),
            nn.Linear(MLP_WIDTH, num_classes),
        )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions on normalised, rectified features, added to the input (He et al. 2016, pre-activation)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(CONV_GROUPS, width) for _ in range(2)])
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        """[N, width, H, W] -> the same shape."""
        y = x
        for norm, conv in zip(self.norms, self.convs):
            y = conv(F.relu(norm(y)))
        return x + y


class ResNet(nn.Sequential):
    """Patches on a grid of about 8x8, a residual block, half the grid with twice the width, another, and the mean."""

    def __init__(self, num_channels: int, resolution: int, num_classes: int) -> None:
        stride = max(round(resolution / CONV_GRID), 1)
        super().__init__(
            nn.Conv2d(num_channels, CONV_WIDTH, stride, stride=stride),
            ResidualBlock(CONV_WIDTH),
            nn.Conv2d(CONV_WIDTH, 2 * CONV_WIDTH, 2, stride=2),
            ResidualBlock(2 * CONV_WIDTH),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * CONV_WIDTH, num_classes),
        )


class TransformerBlock(nn.Module):
    """Self-attention and two dense layers, each on normalised tokens and added to them."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm, self.dense_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dense = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width] -> the same shape."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, width / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.dense(self.dense_norm(x))


class VisionTransformer(nn.Module):
    """4x4 patches as tokens with learned places, two blocks, and the mean (Dosovitskiy et al. 2021, made tiny)."""

    def __init__(self, num_channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        self.patch = resolution // VIT_GRID
        self.embed = nn.Linear(num_channels * self.patch**2, VIT_WIDTH)
        self.place = nn.Parameter(0.02 * nn.init.normal_(self.embed.weight.new_empty(1, VIT_GRID**2, VIT_WIDTH)))
        self.blocks = nn.Sequential(*[TransformerBlock(VIT_WIDTH, VIT_HEADS) for _ in range(VIT_DEPTH)])
        self.norm = nn.LayerNorm(VIT_WIDTH)
        self.head = nn.Linear(VIT_WIDTH, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits."""
        p = self.patch
        patches = x.unflatten(2, (-1, p)).unflatten(4, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # [N, gy, gx, C, p, p]
        tokens = self.embed(patches.flatten(3).flatten(1, 2)) + self.place
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {"mlp": Mlp, "resnet": ResNet, "vit": VisionTransformer}
