"""nnFormer: a volumetric Swin transformer with convolutional embedding and a cross-attending decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from monai.networks.layers import DropPath
from torch import Tensor, nn

from custom.encoders.masking import hidden_voxels
from custom.encoders.positions import resize_positions, sincos_positions
from custom.errors import AliceError

PositionEmbedding: TypeAlias = Literal["none", "sincos", "learnable"]
RelativeIndex: TypeAlias = Literal["official", "injective"]

MLP_RATIO = 4  # the authors' code
TABLE_STD = 0.02  # of the tables' first values; the authors' code
SHIFT_PENALTY = -100.0  # added between tokens that only the cyclic shift made neighbours; the authors' code


def relative_position_index(
    window: int, table_window: int, kind: RelativeIndex, device: torch.device | None = None
) -> Tensor:
    """Row of the bias table for every pair of tokens of a cubic window.

    With offsets d shifted to be >= 0 and w = ``table_window``, the authors' row is
    ``d_s (3w - 1) + d_h (2w - 1) + d_w``, which gives distinct offsets the same row (115 of 343 rows are used
    for w = 4); ``"injective"`` is ``d_s (2w - 1)^2 + d_h (2w - 1) + d_w``.

    Args:
        window: tokens along each side of the window.
        table_window: the window the table was made for; a smaller window uses its central part.
        kind: ``"official"`` for published weights, ``"injective"`` from scratch.
        device: where the result lives.

    Returns:
        Int64 (window^3, window^3), entries in [0, (2 * table_window - 1)^3).

    Raises:
        AliceError: if ``window`` exceeds ``table_window``, or ``kind`` is neither of the two.
    """
    if kind not in ("official", "injective"):
        raise AliceError(f"relative_index must be 'official' or 'injective', got {kind!r}.")
    if window > table_window:
        raise AliceError(
            f"A bias table made for windows of {table_window} has no rows for windows of {window}."
        )
    side = 2 * table_window - 1
    axis = torch.arange(window, device=device)
    coordinates = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1)
    offsets = coordinates[:, :, None] - coordinates[:, None, :] + table_window - 1
    slowest = 3 * table_window - 1 if kind == "official" else side * side
    return offsets[0] * slowest + offsets[1] * side + offsets[2]


def partition(x: Tensor, window: int) -> Tensor:
    """Cut (B, S, H, W, C), sides multiples of ``window``, into (B, windows, window^3, C)."""
    batch, s, h, w, channels = x.shape
    x = x.view(batch, s // window, window, h // window, window, w // window, window, channels)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, -1, window**3, channels)


def unpartition(windows: Tensor, window: int, grid: Sequence[int]) -> Tensor:
    """Undo :func:`partition`: (B, windows, window^3, C) -> (B, S, H, W, C)."""
    s, h, w = grid
    batch, channels = windows.shape[0], windows.shape[-1]
    x = windows.view(batch, s // window, h // window, w // window, window, window, window, channels)
    return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, s, h, w, channels)


def shift_mask(grid: Sequence[int], window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """What is added to the attention of shifted windows: 0 within a region of the unshifted grid, else -100.

    Args:
        grid: tokens along each axis, multiples of ``window``.
        window: tokens along each side of a window.
        shift: how far the grid was rolled.
        device: where the result lives.

    Returns:
        Float (windows, window^3, window^3).
    """
    bands = []
    for size in grid:
        position = torch.arange(size, device=device)
        bands.append((position >= size - window).long() + (position >= size - shift).long())  # 0, 1 or 2
    region = 9 * bands[0][:, None, None] + 3 * bands[1][:, None] + bands[2]  # 27 regions
    region = partition(region[None, ..., None], window)[0, ..., 0]
    apart = region[:, None, :] != region[:, :, None]
    return apart.to(torch.float32) * SHIFT_PENALTY


class WindowAttention(nn.Module):
    """Attention within windows, with a bias per head and relative position.

    With ``cross`` the query is not projected, and keys and values come from a context.
    """

    relative_position_index: Tensor

    def __init__(
        self, dim: int, num_heads: int, window: int, kind: RelativeIndex, *, cross: bool = False
    ) -> None:
        super().__init__()
        self.num_heads, self.window, self.kind = num_heads, window, kind
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=TABLE_STD)
        index = relative_position_index(window, window, kind)
        self.register_buffer("relative_position_index", index, persistent=False)
        if cross:
            self.kv = nn.Linear(dim, 2 * dim)
        else:
            self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def bias(self, window: int) -> Tensor:
        """Bias (heads, window^3, window^3) for windows no larger than those the table was made for."""
        index = self.relative_position_index
        if window != self.window:
            index = relative_position_index(window, self.window, self.kind, index.device)
        return self.relative_position_bias_table[index].permute(2, 0, 1)

    def forward(
        self, x: Tensor, window: int, *, context: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend within each window.

        Args:
            x: (B, windows, window^3, C).
            window: tokens along each side of the windows.
            context: as ``x``; needed with ``cross``, else None.
            mask: (windows, window^3, window^3), added to the attention.

        Returns:
            (B, windows, window^3, C).
        """
        batch, windows, length, channels = x.shape
        heads = self.num_heads
        projected = self.qkv(x) if context is None else torch.cat([x, self.kv(context)], dim=-1)
        parts = projected.view(batch * windows, length, 3, heads, channels // heads)
        # each (B * windows, heads, length, C / heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)

        bias = self.bias(window)[None]
        if mask is not None:  # heads and windows share an axis, so that one bias serves the whole batch
            bias = (bias + mask[:, None]).reshape(1, windows * heads, length, length)
            query, key, value = (
                part.reshape(batch, windows * heads, length, -1) for part in (query, key, value)
            )
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        out = out.view(batch, windows, heads, length, -1).transpose(2, 3)
        return self.proj(out.reshape(batch, windows, length, channels))


class MLP(nn.Module):
    """Two linear maps with an exact GELU between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, MLP_RATIO * dim)
        self.fc2 = nn.Linear(MLP_RATIO * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm Swin block on (B, S, H, W, C); with ``cross`` the decoder's first block of a stage.

    If the smallest side of a grid is at most ``window``, the window gets that side and nothing is shifted.
    Sides that are not multiples of the window are padded with zeros after the norm, as in nnFormer's code;
    the padding takes part in the attention.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        kind: RelativeIndex,
        *,
        shifted: bool = False,
        cross: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.window, self.shifted = window, shifted
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads, window, kind, cross=cross)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor, *, query: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        """Add attention, of ``query`` to ``context`` with ``cross``, else of ``x`` to itself, and an MLP."""
        attended = self.attend(
            self.norm1(x if query is None else query), None if context is None else self.norm1(context)
        )
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Pad, shift, attend within windows, and undo the first two."""
        grid = x.shape[1:4]
        window = min(self.window, *grid)
        shift = window // 2 if self.shifted and min(grid) > self.window else 0
        padded = [math.ceil(size / window) * window for size in grid]
        mask = shift_mask(padded, window, shift, x.device) if shift else None

        def windows_of(y: Tensor) -> Tensor:
            s, h, w = (p - g for p, g in zip(padded, grid, strict=True))
            y = F.pad(y, (0, 0, 0, w, 0, h, 0, s))
            return partition(y.roll((-shift,) * 3, (1, 2, 3)) if shift else y, window)

        context_windows = None if context is None else windows_of(context)
        out = unpartition(
            self.attn(windows_of(x), window, context=context_windows, mask=mask), window, padded
        )
        out = out.roll((shift,) * 3, (1, 2, 3)) if shift else out
        return out[:, : grid[0], : grid[1], : grid[2]]


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a channels-first module to (B, S, H, W, C)."""
    return conv(x.movedim(-1, 1)).movedim(1, -1)


class Projection(nn.Module):
    """Two 3^3 convolutions, the first strided; GELU and norm after each, but not after the ``last``."""

    def __init__(self, in_dim: int, dim: int, stride: Sequence[int], *, last: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_dim, dim, 3, stride=(stride[0], stride[1], stride[2]), padding=1)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = None if last else nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.gelu(convolve(self.conv1, x)))
        x = convolve(self.conv2, x)
        return x if self.norm2 is None else self.norm2(F.gelu(x))


class PatchEmbed(nn.Module):
    """Patches by four convolutions: (B, S, H, W, in) -> (B, gs, gh, gw, dim)."""

    def __init__(self, in_channels: int, dim: int, patch: Sequence[int]) -> None:
        super().__init__()
        # 2^3: strides 2 and 1, the authors' code; [2, 4, 4]: [2, 2, 2] and [1, 2, 2], nnFormer for Synapse
        first = [min(side, 2) for side in patch]
        second = [side // stride for side, stride in zip(patch, first, strict=True)]
        self.proj1 = Projection(in_channels, dim // 2, first, last=False)
        self.proj2 = Projection(dim // 2, dim, second, last=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj2(self.proj1(x)))


class Downsample(nn.Module):
    """Half the grid, double the channels: GELU, norm, strided 3^3 convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.reduction = nn.Conv3d(dim, 2 * dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.reduction, self.norm(F.gelu(x)))


class Upsample(nn.Module):
    """Double the grid, half the channels: norm, transposed convolution."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2 * dim)
        self.up = nn.ConvTranspose3d(2 * dim, dim, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.up, self.norm(x))


class EncoderStage(nn.Module):
    """Blocks of one resolution, every second one shifted, and the downsampling if there is one."""

    def __init__(self, blocks: Sequence[Block], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class DecoderStage(nn.Module):
    """Upsampling, a cross block between the upsampled map and the skip, then shifted blocks."""

    def __init__(self, blocks: Sequence[Block], upsample: Upsample) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        up = self.upsample(x)
        x = self.blocks[0](up + skip, query=up, context=skip)
        for block in self.blocks[1:]:
            x = block(x)
        return x


def _drop_rates(largest: float, blocks: int) -> list[float]:
    """Drop-path rates growing evenly from 0, block by block."""
    return [largest * i / max(blocks - 1, 1) for i in range(blocks)]


class NNFormerEncoder(nn.Module):
    """The part of :class:`NNFormer` that is pre-trained; see there for the arguments.

    Attributes:
        patch: voxels per token of the first map, along S, H, W.
        stride: voxels per token of the last map (the bottleneck), along S, H, W.
        grid: tokens of the first map at ``img_size``.
        position_table: (1, N, C), or None. A buffer for ``"sincos"``, a parameter for ``"learnable"``.
        mask_token: only there because the official state dict has it; unused, so it is frozen.
    """

    position_table: Tensor | None

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int],
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int],
        patch_size: Sequence[int],
        position_embedding: PositionEmbedding,
        relative_index: RelativeIndex,
        drop_path_rate: float,
        mask_token: bool,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.patch = tuple(patch_size)
        self.stride = tuple(side * 2 ** (len(depths) - 1) for side in patch_size)
        self.check_size(img_size)
        self.grid = tuple(size // side for size, side in zip(img_size, patch_size, strict=True))

        self.patch_embed = PatchEmbed(in_channels, embed_dim, patch_size)
        if mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim), requires_grad=False)
        self._add_positions(position_embedding, embed_dim)

        rates = iter(_drop_rates(drop_path_rate, sum(depths)))
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            dim = embed_dim * 2**i
            window = min(window_size[i], *(side // 2**i for side in self.grid))
            blocks = [
                Block(dim, num_heads[i], window, relative_index, shifted=j % 2 == 1, drop_path=next(rates))
                for j in range(depth)
            ]
            self.layers.append(EncoderStage(blocks, Downsample(dim) if i + 1 < len(depths) else None))
            self.norms.append(nn.LayerNorm(dim))

    def _add_positions(self, kind: PositionEmbedding, width: int) -> None:
        if kind == "none":
            self.position_table = None
        elif kind == "sincos":
            s, h, w = self.grid
            self.register_buffer("position_table", sincos_positions((s, h, w), width).clone())
        elif kind == "learnable":
            table = torch.empty(1, math.prod(self.grid), width)
            self.position_table = nn.Parameter(nn.init.trunc_normal_(table, std=TABLE_STD))
        else:
            raise AliceError(f"position_embedding must be 'none', 'sincos' or 'learnable', got {kind!r}.")

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse sizes (S, H, W) that cannot be halved evenly down to the bottleneck.

        Raises:
            AliceError: names the axis and the nearest valid sizes.
        """
        for axis, side, stride in zip(("S (x)", "H (y)", "W (z)"), size, self.stride, strict=True):
            if side < stride or side % stride:
                below, above = side // stride * stride, (side // stride + 1) * stride
                nearest = f"{below} or {above}" if below else f"{above}"
                raise AliceError(
                    f"Axis {axis} has {side} voxels, nnFormer needs a multiple of {stride}: take {nearest}."
                )

    def forward(self, x: Tensor, *, hidden: Tensor | None = None) -> list[Tensor]:
        """Encode a crop; see :meth:`NNFormer.encode`."""
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise AliceError(f"Expected a volume (B, {self.in_channels}, S, H, W), got {tuple(x.shape)}.")
        self.check_size(x.shape[2:])
        if hidden is not None:
            x = x.masked_fill(self._hidden_voxels(hidden, x), 0.0)

        x = self.patch_embed(x.movedim(1, -1))  # (B, gs, gh, gw, C)
        if self.position_table is not None:
            positions = resize_positions(self.position_table, self.grid, x.shape[1:4])
            x = x + positions.view(1, *x.shape[1:])

        maps = []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            assert isinstance(stage, EncoderStage)
            x = stage(x)
            maps.append(norm(x).movedim(-1, 1).contiguous())  # (B, C, gs, gh, gw)
            if stage.downsample is not None:
                x = stage.downsample(x)
        return maps

    def _hidden_voxels(self, hidden: Tensor, x: Tensor) -> Tensor:
        grid = tuple(side // stride for side, stride in zip(x.shape[2:], self.stride, strict=True))
        if tuple(hidden.shape) != (x.shape[0], *grid) or hidden.dtype != torch.bool:
            raise AliceError(
                f"Hidden tokens must be bool {(x.shape[0], *grid)}, one per {self.stride} voxels, "
                f"got {hidden.dtype} {tuple(hidden.shape)}."
            )
        return hidden_voxels(hidden.to(x.device), self.stride)


class NNFormerDecoder(nn.Module):
    """Decodes the encoder's maps; see :class:`NNFormer` for the arguments."""

    def __init__(
        self,
        grid: Sequence[int],
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int],
        relative_index: RelativeIndex,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        stages = len(depths) - 1
        rates = iter(_drop_rates(drop_path_rate, sum(depths[:stages])))
        layers: list[DecoderStage] = []
        for i in reversed(range(stages)):  # from the coarsest up: the finest stage drops most
            window = min(window_size[i], *(side // 2**i for side in grid))
            blocks = [
                Block(
                    embed_dim * 2**i,
                    num_heads[i],
                    window,
                    relative_index,
                    shifted=j > 0,
                    cross=j == 0,
                    drop_path=next(rates),
                )
                for j in range(depths[i])
            ]
            layers.insert(0, DecoderStage(blocks, Upsample(embed_dim * 2**i)))
        self.layers = nn.ModuleList(layers)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Decode; see :meth:`NNFormer.decode`."""
        *skips, x = (m.movedim(1, -1) for m in maps)
        if len(skips) != len(self.layers):
            raise AliceError(f"The decoder takes the encoder's {len(self.layers) + 1} maps, got {len(maps)}.")
        decoded = []
        for stage, skip in zip(reversed(self.layers), reversed(skips), strict=True):
            x = stage(x, skip)
            decoded.append(x.movedim(-1, 1).contiguous())
        return decoded


class NNFormer(nn.Module):
    """nnFormer as in the authors' code of Alice: 64^3 crops, width 48, patches of 2^3 by default.

    The axes are called S, H, W in the order of storage. Our volumes ``(B, C, X, Y, Z)`` go in unchanged: S is
    x (Right), H is y (Anterior), W is z (Superior), as in the authors' MONAI pipeline. (Upstream nnFormer
    reads volumes as z, y, x: see :meth:`synapse_settings`.)

    Crops of other sizes than ``img_size`` must be multiples of ``patch_size * 2^(stages - 1)``, 16 voxels by
    default. Windows then follow the rule of :class:`Block`, and the position table is interpolated. Windows
    are never larger than at ``img_size``, which sets the size of the bias tables.

    The default has 7 651 668 parameters in the encoder, 2 071 404 in the decoder, 9 725 763 with the heads; a
    learnable position table adds to these.

    Args:
        in_channels: channels of the volume.
        out_channels: channels of the logits.
        img_size: voxels along S, H, W that the tables are made for.
        embed_dim: channels of the first map; each stage doubles them.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of the cubic windows per stage, tokens.
        patch_size: voxels per token of the first map, each 1, 2 or 4.
        position_embedding: ``"sincos"`` (fixed), ``"learnable"`` or ``"none"``; saved in the state dict. The
            authors' table is random and in no checkpoint.
        relative_index: ``"official"`` for published weights, ``"injective"`` from scratch
            (see :func:`relative_position_index`).
        drop_path_rate: largest share of dropped residual branches, while training only.
        mask_token: keep the authors' unused mask token, frozen, so that state dicts have the same keys.
        deep_supervision: True returns the logits of all heads from ``forward``, False those of the finest
            head.

    Raises:
        AliceError: if lengths differ between stages, a size or a width does not divide, or a name is unknown.

    Attributes:
        settings: the arguments as plain values, for the file that carries the weights.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        *,
        img_size: Sequence[int] = (64, 64, 64),
        embed_dim: int = 48,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (6, 12, 24, 48),
        window_size: Sequence[int] = (4, 4, 8, 4),
        patch_size: Sequence[int] = (2, 2, 2),
        position_embedding: PositionEmbedding = "sincos",
        relative_index: RelativeIndex = "injective",
        drop_path_rate: float = 0.2,
        mask_token: bool = True,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self._check(img_size, embed_dim, depths, num_heads, window_size, patch_size)
        self.settings: dict[str, Any] = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "img_size": list(img_size),
            "embed_dim": embed_dim,
            "depths": list(depths),
            "num_heads": list(num_heads),
            "window_size": list(window_size),
            "patch_size": list(patch_size),
            "position_embedding": position_embedding,
            "relative_index": relative_index,
            "drop_path_rate": drop_path_rate,
            "mask_token": mask_token,
            "deep_supervision": deep_supervision,
        }
        self.deep_supervision = deep_supervision
        self.encoder = NNFormerEncoder(
            in_channels,
            img_size,
            embed_dim,
            depths,
            num_heads,
            window_size,
            patch_size,
            position_embedding,
            relative_index,
            drop_path_rate,
            mask_token,
        )
        self.decoder = NNFormerDecoder(
            self.encoder.grid, embed_dim, depths, num_heads, window_size, relative_index, drop_path_rate
        )
        patch = (patch_size[0], patch_size[1], patch_size[2])
        self.final = nn.ModuleList(
            nn.ConvTranspose3d(embed_dim * 2**i, out_channels, patch, patch) for i in range(len(depths) - 1)
        )

    @staticmethod
    def _check(
        img_size: Sequence[int],
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: Sequence[int],
        patch_size: Sequence[int],
    ) -> None:
        if not len(depths) == len(num_heads) == len(window_size) >= 2 or min(depths) < 1:
            raise AliceError(
                "depths, num_heads and window_size need one entry per stage, two stages or more, got "
                f"{list(depths)}, {list(num_heads)}, {list(window_size)}."
            )
        if len(img_size) != 3 or len(patch_size) != 3 or not set(patch_size) <= {1, 2, 4}:
            raise AliceError(
                "img_size and patch_size need three entries, patches of 1, 2 or 4, "
                f"got {list(img_size)} and {list(patch_size)}."
            )
        if min(window_size) < 2:
            raise AliceError(f"Windows need a side of 2 tokens or more, got {list(window_size)}.")
        for i, heads in enumerate(num_heads):
            if embed_dim % 2 or (embed_dim * 2**i) % heads:
                raise AliceError(
                    f"Stage {i}: {embed_dim * 2**i} channels do not divide among {heads} heads: "
                    "change embed_dim (even) or num_heads."
                )

    @staticmethod
    def synapse_settings() -> dict[str, Any]:
        """Arguments of upstream nnFormer for Synapse, whose volumes are stored (z, y, x).

        For volumes in x, y, z reverse ``img_size`` and ``patch_size``; published weights need them as they
        are.
        """
        return {
            "in_channels": 1,
            "out_channels": 14,
            "img_size": [64, 128, 128],
            "embed_dim": 192,
            "depths": [2, 2, 2, 2],
            "num_heads": [6, 12, 24, 48],
            "window_size": [4, 4, 8, 4],
            "patch_size": [2, 4, 4],
            "position_embedding": "none",
            "relative_index": "official",
            "mask_token": False,
        }

    def encode(self, x: Tensor, *, hidden: Tensor | None = None) -> list[Tensor]:
        """Encode a crop.

        Args:
            x: (B, in_channels, S, H, W), sides multiples of the encoder's ``stride`` (16 voxels by default).
            hidden: bool (B, gs, gh, gw), one entry per bottleneck token. The encoder runs dense on the crop
                with hidden voxels set to 0, as the authors do: its convolutions mix neighbours, so a token
                cannot be left out.

        Returns:
            Four normalised maps (B, C, gs, gh, gw), finest first: 32^3 x 48, 16^3 x 96, 8^3 x 192, 4^3 x 384
            for 64^3.

        Raises:
            AliceError: if the shape of ``x`` or ``hidden`` does not fit.
        """
        return self.encoder(x, hidden=hidden)

    def decode(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Decode the encoder's maps.

        Returns:
            Three maps (B, C, gs, gh, gw), coarsest first: 8^3 x 192, 16^3 x 96, 32^3 x 48 for 64^3. (The
            authors' network returns the first one with axes 1 and 4 of its channels-last form swapped; here
            it is not.)
        """
        return self.decoder(maps)

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Logits (B, out_channels, S, H, W) of all heads, finest first, each next one half as large.

        Without ``deep_supervision`` only the finest, as a tensor.
        """
        decoded = self.decode(self.encode(x))[::-1]
        if not self.deep_supervision:
            return self.final[0](decoded[0])
        return [head(grid) for head, grid in zip(self.final, decoded, strict=True)]
