"""MONAI's SwinTransformer on visible units only; it is also faster if nothing is hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
)
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from custom.encoders.window_plan import NUM_STAGES, SwinPlan, WindowPlan, dense_plan_on, plan_for
from custom.errors import AliceError

ATTENTION = ("auto", "chunked", "sdpa", "plain")
MERGING = {PatchMerging: "merging", PatchMergingV2: "mergingv2"}
# scores held at a time (ours): on a CPU 0.1 to 2 million are equally fast, a GPU prefers few large products
CHUNK_CPU, CHUNK_GPU = 2**20, 2**26


class VisibleFeatures(NamedTuple):
    """What the encoder made of the visible units."""

    maps: list[Tensor]  # five scales (B, num_visible, C, s, s, s), s = 16, 8, 4, 2, 1
    units: Tensor  # int64 (B, num_visible), ascending in flattened grid order
    grid: tuple[int, int, int]  # units along x, y, z


class MaskedSwin(SwinTransformer):
    """MONAI's SwinTransformer; with ``hidden=None`` it computes what its parent computes, faster.

    It has no other parameters or buffers, so state dicts load strictly both ways. With hidden units it
    computes the dense network whose window attention cannot see hidden tokens; MONAI's zero padding, which is
    attended, is included. Hidden voxels are never read. ``SwinTransformer.forward(net, x)`` runs MONAI's own
    code.

    Args:
        attention: ``auto`` (``sdpa`` without gradients, ``chunked`` with), ``chunked`` (keeps query, key,
            value and output for the backward pass and nothing quadratic), ``sdpa`` (torch's fused attention)
            or ``plain`` (ordinary autograd), which is also used in training if ``attn_drop_rate`` is above 0.
        kwargs: MONAI's remaining arguments, which differ between its versions.

    The other arguments are MONAI's. ``settings`` holds those that define the network, as plain values:
    ``MaskedSwin(**net.settings)`` builds it again. ``unit`` is the side of a mask unit in voxels, 16 patches:
    the side of one token after the last merging.

    Raises:
        AliceError: for a network that cannot run on visible units: two-dimensional, with v2 convolutions,
            Hyena blocks, another norm or downsampling, unequal patch sides, or not four stages.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        window_size: Sequence[int],
        patch_size: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.LayerNorm] = nn.LayerNorm,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str | type[nn.Module] = "merging",
        use_v2: bool = False,
        *,
        attention: str = "auto",
        **kwargs: Any,
    ) -> None:
        if spatial_dims != 3:
            raise AliceError(f"MaskedSwin needs spatial_dims=3, got {spatial_dims}.")
        patch_size = ensure_tuple_rep(patch_size, 3)
        window_size = ensure_tuple_rep(window_size, 3)
        downsample = downsample if isinstance(downsample, str) else MERGING.get(downsample, str(downsample))
        _refuse_mixing_blocks(downsample, use_v2, norm_layer, kwargs)
        if len(set(patch_size)) != 1:
            raise AliceError(f"MaskedSwin needs a cubic patch, such as (2, 2, 2), got {patch_size}.")
        if len(depths) != NUM_STAGES or len(num_heads) != NUM_STAGES:
            raise AliceError(f"Swin has four stages, got depths {depths} and num_heads {num_heads}.")
        if attention not in ATTENTION:
            raise AliceError(f"attention must be one of {ATTENTION}, got {attention!r}.")
        self.settings: dict[str, Any] = {
            "in_chans": in_chans,
            "embed_dim": embed_dim,
            "window_size": list(window_size),
            "patch_size": list(patch_size),
            "depths": list(depths),
            "num_heads": list(num_heads),
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop_rate": drop_rate,
            "attn_drop_rate": attn_drop_rate,
            "drop_path_rate": drop_path_rate,
            "patch_norm": patch_norm,
            "spatial_dims": spatial_dims,
            "downsample": downsample,
        }
        super().__init__(**self.settings, norm_layer=norm_layer, use_checkpoint=use_checkpoint, **kwargs)
        self.attention = attention
        self.unit = patch_size[0] * 2**NUM_STAGES

    @property
    def stages(self) -> list[BasicLayer]:
        """MONAI's four BasicLayers."""
        return [layers[0] for layers in (self.layers1, self.layers2, self.layers3, self.layers4)]

    def plan(self, hidden: Tensor) -> SwinPlan:
        """See :func:`custom.encoders.window_plan.plan_for`, which needs ``settings`` only."""
        return plan_for(hidden, self.settings)

    def forward(
        self, x: Tensor, normalize: bool = True, *, hidden: Tensor | None = None, plan: SwinPlan | None = None
    ) -> list[Tensor] | VisibleFeatures:
        """Encode a crop, or the visible part of it.

        Args:
            x: crop (B, C, X, Y, Z). With units hidden, every side is a multiple of ``unit``.
            normalize: whether each scale goes through a layer norm without weights, as in MONAI.
            hidden: bool (B, ux, uy, uz) over units, True where the encoder must see nothing. Leave it on the
                CPU for every device of ``x``, since attention is planned there.
            plan: ``self.plan(hidden)``, made in advance by the loader; ``hidden`` is then not read.

        Returns:
            MONAI's five maps (B, C, gx, gy, gz), or the :class:`VisibleFeatures` of the five scales.

        Raises:
            AliceError: if a side is not a multiple of ``unit``, if ``hidden`` or ``plan`` is for another size
                or batch, if samples hide different numbers of units, or if a sample hides all.
        """
        if hidden is None and plan is None:
            window, patch = tuple(self.settings["window_size"]), self.settings["patch_size"][0]
            dense = dense_plan_on(x.device, tuple(x.shape[2:]), patch, window)
            return self._encode(x, x.shape[0], dense, normalize)

        grid = self._grid_of_units(x)
        if plan is None:
            assert hidden is not None
            plan = self.plan(hidden.cpu())
        if (plan.num_samples, *plan.grid) != (x.shape[0], *grid):
            raise AliceError(
                f"The crop has (B, ux, uy, uz) = {(x.shape[0], *grid)} units of {self.unit} voxels, hidden "
                f"has {(plan.num_samples, *plan.grid)}: draw it with hide_tokens for the crop's own units."
            )
        plan = plan.to(x.device)
        cubes = cut_units(x, plan, self.unit)  # (B * num_visible, C, unit, unit, unit)
        maps = self._encode(cubes, x.shape[0], plan, normalize)
        return VisibleFeatures(
            [scale.unflatten(0, (x.shape[0], plan.num_visible)) for scale in maps], plan.units.long(), grid
        )

    def _encode(self, boxes: Tensor, batch_size: int, plan: SwinPlan, normalize: bool) -> list[Tensor]:
        """Five scales of ``boxes`` (B * V, C, X, Y, Z), each a brick of which all is visible."""
        features = self.pos_drop(self.patch_embed(boxes))  # (B * V, C, x, y, z)
        maps = [self.proj_out(features, normalize)]
        for stage, (plain, shifted) in zip(self.stages, plan.stages, strict=True):
            box = features.shape[2:]
            tokens = rearrange(features, "(b v) c x y z -> b (v x y z) c", b=batch_size)
            for block in stage.blocks:
                windows = shifted if any(block.shift_size) else plain
                if block.use_checkpoint and torch.is_grad_enabled():
                    tokens = checkpoint(self._block, block, tokens, windows, use_reentrant=False)
                else:
                    tokens = self._block(block, tokens, windows)
            merged = stage.downsample(tokens.reshape(-1, *box, tokens.shape[-1]))
            features = rearrange(merged, "b x y z c -> b c x y z")
            maps.append(self.proj_out(features, normalize))
        return maps

    def _block(self, block: SwinTransformerBlock, tokens: Tensor, windows: WindowPlan) -> Tensor:
        """MONAI's SwinTransformerBlock on tokens (B, N, C)."""
        attended = window_attention(block.attn, block.norm1(tokens), windows, self.attention)
        tokens = tokens + block.drop_path(attended)
        return tokens + block.forward_part2(tokens)

    def _grid_of_units(self, x: Tensor) -> tuple[int, int, int]:
        for name, side in zip("XYZ", x.shape[2:], strict=True):
            if side % self.unit or side == 0:
                below, above = side // self.unit * self.unit, -(-side // self.unit) * self.unit
                raise AliceError(
                    f"Hiding units of {self.unit} voxels needs sides that are multiples of it, got {name} = "
                    f"{side}: crop to {below or self.unit} or pad to {max(above, self.unit)}."
                )
        ux, uy, uz = (side // self.unit for side in x.shape[2:])
        return ux, uy, uz


def _refuse_mixing_blocks(downsample: str, use_v2: bool, norm_layer: type, kwargs: dict[str, Any]) -> None:
    """Refuse modules that would mix visible and hidden tokens, or that ``settings`` cannot hold."""
    if use_v2:
        raise AliceError(
            "MaskedSwin cannot run use_v2=True: its convolutions mix visible and hidden tokens. "
            "Build the encoder, and the SwinUNETR that takes it, with use_v2=False."
        )
    if kwargs.get("use_hyena") or any(kwargs.get("hyena_stages") or ()):
        raise AliceError("MaskedSwin cannot run Hyena blocks: pass use_hyena=False and hyena_stages=None.")
    if downsample not in MERGING.values():
        raise AliceError(f"downsample must be 'merging' or 'mergingv2' in MaskedSwin, got {downsample!r}.")
    if norm_layer is not nn.LayerNorm:
        raise AliceError(f"norm_layer must be torch.nn.LayerNorm in MaskedSwin, got {norm_layer}.")


def cut_units(x: Tensor, plan: SwinPlan, unit: int) -> Tensor:
    """Visible units of crops (B, C, X, Y, Z), one after the other, (B * num_visible, C, unit, unit, unit)."""
    ux, uy, uz = plan.grid
    units = rearrange(
        x, "b c (ux x) (uy y) (uz z) -> (b ux uy uz) c x y z", x=unit, y=unit, z=unit, ux=ux, uy=uy, uz=uz
    )
    return units.index_select(0, _unit_rows(plan.units, plan.grid))


def to_grid(features: VisibleFeatures) -> list[Tensor]:
    """Lay visible units out as five maps (B, C, gx, gy, gz), zero where hidden."""
    rows = _unit_rows(features.units, features.grid)
    ux, uy, uz = features.grid
    grids = []
    for scale in features.maps:
        batch_size, _, *box = scale.shape
        empty = scale.new_zeros(batch_size * ux * uy * uz, *box)
        full = empty.index_copy(0, rows, scale.flatten(0, 1))
        grids.append(rearrange(full, "(b ux uy uz) c x y z -> b c (ux x) (uy y) (uz z)", ux=ux, uy=uy, uz=uz))
    return grids


def _unit_rows(units: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Rows of ``units`` (B, num_visible) among the units of all samples, int64 (B * num_visible,)."""
    num_units = grid[0] * grid[1] * grid[2]
    first = torch.arange(units.shape[0], device=units.device)[:, None] * num_units
    return (first + units).flatten()


# -- window attention ---------------------------------------------------------------------------------


@torch.compiler.disable  # its shapes change with every mask; norms, MLPs and mergings compile
def window_attention(
    attn: WindowAttention, tokens: Tensor, plan: WindowPlan, attention: str = "auto"
) -> Tensor:
    """MONAI's WindowAttention over the groups of ``plan``, padding and shift included.

    Args:
        attn: MONAI's WindowAttention.
        tokens: (B, N, C) after the norm; B * N is ``plan``'s number of tokens, or a multiple of it where one
            plan serves every sample.
        plan: who attends to whom, on the device of ``tokens``.
        attention: see :class:`MaskedSwin`.

    Returns:
        (B, N, C), projected and dropped out.
    """
    if attn.training and attn.attn_drop.p > 0:
        attention = "plain"
    elif attention == "auto":
        attention = "chunked" if torch.is_grad_enabled() else "sdpa"
    attend = {"chunked": _ChunkedAttention.apply, "sdpa": _fused_attention, "plain": _plain_attention}[
        attention
    ]

    batch_size, num_tokens, channels = tokens.shape
    qkv = attn.qkv(tokens).view(-1, plan.layout.num_tokens, 3 * channels)  # (R, T, 3 C)
    # a padded token is zero before qkv, so after it has qkv's bias; a filler uses the same row and is never
    # attended
    virtual = qkv.new_zeros(3 * channels) if attn.qkv.bias is None else attn.qkv.bias.to(qkv.dtype)
    qkv = torch.cat([qkv, virtual.expand(len(qkv), 1, -1)], dim=1)  # (R, T + 1, 3 C)
    bias = position_bias(attn, plan)  # (H, n, n + P + 1)

    outputs = []
    sizes = [bucket.num_groups * bucket.length for bucket in plan.layout.buckets]
    for bucket, gather, slots in zip(
        plan.layout.buckets, plan.gather.split(sizes), plan.slots.split(sizes), strict=True
    ):
        grouped = qkv.index_select(1, gather)
        query, key, value = rearrange(
            grouped, "r (g l) (three h d) -> three r g h l d", l=bucket.length, three=3, h=attn.num_heads
        ).unbind(0)
        places = None if bucket.whole else slots.view(bucket.num_groups, bucket.length)
        out = attend(query, key, value, bias, places, attn)
        outputs.append(rearrange(out, "r g h l d -> r (g l) (h d)"))
    out = torch.cat(outputs, dim=1).index_select(1, plan.restore).view(batch_size, num_tokens, channels)
    return attn.proj_drop(attn.proj(out))


def position_bias(attn: WindowAttention, plan: WindowPlan) -> Tensor:
    """What is added to the scores: a row per slot of the query, a column per slot of the key.

    Returns:
        (H, n, n + P + 1), at least float32: MONAI's relative position bias (its own look-up for shrunk
        windows), the virtual key of each padding pattern, and -inf for fillers.
    """
    num_slots = plan.layout.num_slots
    lookup = attn.relative_position_index[:num_slots, :num_slots]
    bias = attn.relative_position_bias_table[lookup].permute(2, 0, 1)  # (H, n, n)
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    columns = [bias]
    if plan.layout.num_patterns:
        # logsumexp over each pattern as one product, in double since the maximum is over all slots
        largest = bias.detach().amax(dim=-1, keepdim=True)
        total = (bias - largest).double().exp() @ plan.padded.double().T  # (H, n, P)
        columns.append(total.log().to(bias.dtype) + largest)
    columns.append(bias.new_full((*bias.shape[:2], 1), -torch.inf))
    return torch.cat(columns, dim=-1)


def _group_bias(bias: Tensor, places: Tensor | None) -> Tensor:
    """Bias of groups whose slots are ``places`` (G, L), (G, H, L, L); of whole windows (1, H, n, n)."""
    num_slots = bias.shape[1]
    if places is None:
        return bias[None, :, :, :num_slots]
    rows = places.clamp(max=num_slots - 1)  # virtual and filler queries are never used
    return bias[:, rows[:, :, None], places[:, None, :]].transpose(0, 1)


def _probabilities(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax in at least float32; ``query`` and ``key`` (R, G, H, L, d), ``bias`` (G or 1, H, L, L)."""
    scores = torch.matmul(query * scale, key.transpose(-2, -1)).to(bias.dtype)
    return torch.softmax(scores.add_(bias), dim=-1)


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, places: Tensor | None, attn: WindowAttention
) -> Tensor:
    probabilities = _probabilities(query, key, _group_bias(bias, places), attn.scale)
    return torch.matmul(attn.attn_drop(probabilities).to(value.dtype), value)


def _chunks(query: Tensor) -> list[slice]:
    """Slices of groups whose scores are held in memory together."""
    repeats, num_groups, num_heads, length, _ = query.shape
    most = CHUNK_GPU if query.is_cuda else CHUNK_CPU
    step = max(1, most // (repeats * num_heads * length**2))
    return [slice(start, start + step) for start in range(0, num_groups, step)]


def _fused_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, places: Tensor | None, attn: WindowAttention
) -> Tensor:
    bias = bias.to(query.dtype)
    outputs = []
    for part in _chunks(query):
        group_bias = _group_bias(bias, None if places is None else places[part])
        group_bias = group_bias.expand(query[:, part].shape[1], -1, -1, -1)
        repeats = [
            F.scaled_dot_product_attention(*sample, attn_mask=group_bias, scale=attn.scale)
            for sample in zip(query[:, part], key[:, part], value[:, part], strict=True)
        ]
        outputs.append(torch.stack(repeats))
    return torch.cat(outputs, dim=1)


class _ChunkedAttention(torch.autograd.Function):
    """Attention that holds the scores of few groups at a time, and computes them again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor,
        places: Tensor | None,
        attn: WindowAttention,
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        out = torch.empty_like(query)
        for part in _chunks(query):
            group_bias = _group_bias(bias, None if places is None else places[part])
            probabilities = _probabilities(query[:, part], key[:, part], group_bias, attn.scale)
            out[:, part] = torch.matmul(probabilities.to(value.dtype), value[:, part])
        ctx.save_for_backward(query, key, value, out, bias, places)
        ctx.scale = attn.scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, bias, places = ctx.saved_tensors
        grad_query, grad_key, grad_value = map(torch.empty_like, (query, key, value))
        grad_bias = torch.zeros_like(bias)
        for part in _chunks(query):
            part_places = None if places is None else places[part]
            group_bias = _group_bias(bias, part_places)
            probabilities = _probabilities(query[:, part], key[:, part], group_bias, ctx.scale)
            grad = grad_out[:, part]
            grad_value[:, part] = torch.matmul(probabilities.to(grad.dtype).transpose(-2, -1), grad)

            # softmax: dS = P * (dP - sum(dP * P)), and that sum is sum(dO * O)
            grad_scores = torch.matmul(grad, value[:, part].transpose(-2, -1)).to(bias.dtype)
            grad_scores -= (grad * out[:, part]).sum(dim=-1, keepdim=True, dtype=bias.dtype)
            grad_scores *= probabilities
            _add_group_bias_(grad_bias, grad_scores.sum(dim=0), part_places)

            grad_scores = grad_scores.to(query.dtype)
            grad_query[:, part] = torch.matmul(grad_scores, key[:, part]) * ctx.scale
            grad_key[:, part] = torch.matmul(grad_scores.transpose(-2, -1), query[:, part] * ctx.scale)
        return grad_query, grad_key, grad_value, grad_bias, None, None


def _add_group_bias_(bias: Tensor, group_bias: Tensor, places: Tensor | None) -> None:
    """The adjoint of :func:`_group_bias`: add (G, H, L, L) to ``bias`` (H, n, n + P + 1) in place."""
    num_heads, num_slots, num_columns = bias.shape
    if places is None:
        bias[:, :, :num_slots] += group_bias.sum(dim=0)
        return
    rows = places.clamp(max=num_slots - 1)
    entry = rows[:, :, None] * num_columns + places[:, None, :]  # (G, L, L)
    rows_of_heads = group_bias.transpose(0, 1).reshape(num_heads, -1)
    # scatter_add_ with an expanded index: a third less time on a CPU than index_add_
    bias.view(num_heads, -1).scatter_add_(1, entry.flatten().expand(num_heads, -1), rows_of_heads)
