"""A small vision transformer with norms before attention and perceptron, and the average of its tokens as its answer.

It has no batch norm, so `bounded_weight_norm` is the method for it.

Sources: Vaswani et al., Attention Is All You Need, NeurIPS 2017; Dosovitskiy et al., An Image Is Worth 16x16 Words,
ICLR 2021.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowprec.errors import ConfigError
from lowprec.models.parts import Act, ActFactory, Norm, NormFactory, act_factory, no_norm, norm_factory


class Attention(nn.Module):
    """Self-attention with `heads` heads over tokens (N, L, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels), heads

    def forward(self, x_NLC: Tensor) -> Tensor:
        """proj(softmax(q k^T / sqrt(C / heads)) v), the heads side by side."""
        q, k, v = self.qkv(x_NLC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y_NHLD = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.proj(y_NHLD.transpose(1, 2).flatten(2))
        return result


class EncoderBlock(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)); the perceptron is four times as wide."""

    def __init__(self, channels: int, heads: int, norm: NormFactory, act: ActFactory) -> None:
        super().__init__()
        self.norm1, self.attention = norm(channels), Attention(channels, heads)
        self.norm2 = norm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), act(), nn.Linear(4 * channels, channels))

    def forward(self, x_NLC: Tensor) -> Tensor:
        """Tokens of the same shape."""
        x_NLC = x_NLC + self.attention(self.norm1(x_NLC))
        result: Tensor = x_NLC + self.mlp(self.norm2(x_NLC))
        return result


class Transformer(nn.Module):
    """Patches to tokens, a learned position added; blocks; a norm, the average over the tokens, a classifier."""

    def __init__(self, patches: nn.Conv2d, tokens: int, blocks: nn.Sequential, norm: nn.Module, classes: int) -> None:
        super().__init__()
        channels = patches.out_channels
        self.patches, self.position = patches, nn.Parameter(torch.empty(tokens, channels))
        self.blocks, self.norm, self.classifier = blocks, norm, nn.Linear(channels, classes)
        nn.init.normal_(self.position, 0, 0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, in_channels, size, size)."""
        tokens_NLC = self.patches(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.classifier(self.norm(self.blocks(tokens_NLC)).mean(1))
        return logits


def transformer(
    norm: Norm = nn.LayerNorm,
    act: Act = nn.GELU,
    classes: int = 10,
    in_channels: int = 1,
    size: int = 8,
    patch: int = 2,
    channels: int = 64,
    blocks: int = 2,
    heads: int = 4,
) -> nn.Module:
    """A small vision transformer; with the defaults 102 thousand parameters, made for the 8x8 digits.

    Linear weights start as Xavier's uniform numbers, biases at zero, positions from N(0, 0.02^2), as in ViT; the
    patches' convolution as torch has it.

    Args:
        norm: called with the number of channels, over the last axis, or `layer` for torch's LayerNorm, or `none`.
        act: of the perceptrons; see `parts.Options`.
        classes: outputs.
        in_channels: channels of the images.
        size: rows and columns of the images.
        patch: rows and columns of a patch, which becomes one token.
        channels: of a token.
        blocks: how many.
        heads: of the attention.

    Raises:
        ConfigError: a name that there is not, `size` not a multiple of `patch` or `channels` not one of `heads`.
    """
    for name, whole, part_name, part in (("size", size, "patch", patch), ("channels", channels, "heads", heads)):
        if whole % part:
            raise ConfigError(f"transformer: {name} {whole} is not a multiple of {part_name} {part}; choose it so")
    make_norm, make_act = norm_factory(norm, {"layer": nn.LayerNorm}) or no_norm, act_factory(act)
    body = nn.Sequential(*(EncoderBlock(channels, heads, make_norm, make_act) for _ in range(blocks)))
    patches = nn.Conv2d(in_channels, channels, patch, patch)
    return Transformer(patches, (size // patch) ** 2, body, make_norm(channels), classes)
