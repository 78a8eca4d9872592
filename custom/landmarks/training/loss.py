"""SAM's contrastive losses: a matched cell must resemble its counterpart more than cells of any other place."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.errors import AliceError
from custom.landmarks.sam.network import SAMMaps, unit_length

MEASURED = 32  # anchors of a view whose matching error is logged: it takes all cells of the other view


def info_nce(positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """-log of the share that the positive has of all: with n equal similarities log(1 + n).

    Args:
        positive: (A,) similarities.
        negative: (A, K); minus infinity where there is none.
        temperature: by which similarities are divided.

    Returns:
        (A,) losses.
    """
    return (
        torch.logsumexp(torch.cat([positive[:, None], negative], dim=1) / temperature, dim=1)
        - positive / temperature
    )


def hardest(score: Tensor, excluded: Tensor, ranked: int, kept: int) -> tuple[Tensor, Tensor]:
    """Choose negatives: of the ``ranked`` highest scores per row every one in ``ranked / kept``.

    The authors draw ``kept`` of them at random; evenly spaced ranks are the same mix without chance (ours).

    Args:
        score: (A, N), fine plus coarse similarity.
        excluded: bool (A, N), True where a cell may not be a negative. It is never chosen, whatever the others
            score.
        ranked, kept: how many.

    Returns:
        Columns (A, K) and bool (A, K), False where a row had too few to choose from.
    """
    ranked = min(ranked, score.shape[1])
    top, columns = score.masked_fill(excluded, -torch.inf).topk(ranked, dim=1)
    step = max(ranked // max(kept, 1), 1)
    return columns[:, ::step], top[:, ::step] > -torch.inf


class Memory(nn.Module):
    """The last cells of earlier batches: vectors, places and the space that a place is of.

    Args:
        size: cells kept; 0 for none.
        dim: length of a vector.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.vectors: Tensor
        self.places_mm: Tensor
        self.spaces: Tensor
        self.register_buffer("vectors", torch.zeros(size, dim))
        self.register_buffer("places_mm", torch.zeros(size, 3))
        self.register_buffer("spaces", torch.full((size,), -1, dtype=torch.long))  # -1: nothing there yet

    @torch.no_grad()
    def put(self, vectors: Tensor, places_mm: Tensor, spaces: Tensor) -> None:
        """Put cells in front; the oldest leave."""
        size = len(self.spaces)
        self.vectors = torch.cat([vectors.detach(), self.vectors])[:size]
        self.places_mm = torch.cat([places_mm, self.places_mm])[:size]
        self.spaces = torch.cat([spaces, self.spaces])[:size]


class SAMLoss(nn.Module):
    """InfoNCE over all matched cells of a batch of view pairs: fine, coarse (SAM), and both together (ours).

    Negatives of a fine cell are candidates of both views, at least ``exclusion_mm`` away, and the hardest of them by
    fine plus coarse similarity. Negatives of a coarse cell lie in both views and in every other pair of the batch.
    Cells of earlier batches are negatives too (ours: a small batch sees little of the body). What is too near in
    the same space is left out; the authors multiply its similarity by 0, which keeps it in.

    The joint term (ours) is the fine term of the mean of fine and interpolated coarse similarity, which is what
    points are found by: the coarse term alone pulls cells up to 25 mm apart together.

    Args:
        temperature: of all terms (the authors: 0.5; ours: 0.1, see the bundle's README).
        exclusion_mm: (the authors: 20, and 3 for DeepLesion).
        ranked, negatives: of the hardest candidates, and used of them (the authors: 2000 and 500 of 73,728; from
            scratch, negatives as hard as that made all cells alike within a few steps).
        coarse_exclusion_mm: (the authors: 5).
        memory: coarse cells remembered; 0 for none.
        fine_memory: fine cells remembered.
        remembered: of them, new ones of each pair.
        embedding_dim: of the network.
        joint_weight: of the joint term in the total (fine and coarse: 1, as the authors').

    Raises:
        AliceError: for settings out of range.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        exclusion_mm: float = 8.0,
        ranked: int = 2000,
        negatives: int = 250,
        coarse_exclusion_mm: float = 10.0,
        memory: int = 2048,
        fine_memory: int = 4096,
        remembered: int = 256,
        embedding_dim: int = 128,
        joint_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.settings = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if not temperature > 0:
            raise AliceError(f"temperature must be positive, got {temperature}.")
        if min(ranked, negatives) < 1 or min(exclusion_mm, coarse_exclusion_mm, joint_weight) < 0:
            raise AliceError(
                f"Settings out of range: {ranked=}, {negatives=}, {exclusion_mm=}, {coarse_exclusion_mm=}, {joint_weight=}."
            )
        if min(memory, fine_memory, remembered) < 0:
            raise AliceError(f"Settings out of range: {memory=}, {fine_memory=}, {remembered=}.")
        self.temperature, self.exclusion_mm = temperature, exclusion_mm
        self.ranked, self.negatives = ranked, negatives
        self.coarse_exclusion_mm, self.remembered, self.joint_weight = (
            coarse_exclusion_mm,
            remembered,
            joint_weight,
        )
        self.past_coarse = Memory(memory, embedding_dim)
        self.past_fine = Memory(fine_memory, 2 * embedding_dim)

    def forward(self, maps: SAMMaps, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The terms of a batch.

        Args:
            maps: of ``batch["crop"]`` flattened to (2B, 1, Z, Y, X), views of a pair side by side; the fine
                one may be as the network makes it (``unit_fine=False``).
            batch: of ``ViewPairs``, on the maps' device.

        Returns:
            ``total``, ``fine``, ``coarse``, ``joint``, and without gradient ``error_mm``: how far from an anchor's
            place the best match in the other view lies, by fine plus coarse similarity.
        """
        coarse = cells_of(maps.coarse)
        parts: dict[str, list[Tensor]] = {"fine": [], "coarse": [], "joint": [], "error_mm": []}
        for pair in range(len(batch["space"])):
            cells = {k: v[pair] for k, v in batch.items() if k.startswith("fine") or k == "space"}
            views = SAMMaps(*(level[2 * pair : 2 * pair + 2] for level in maps))
            for name, values in self._fine(views, cells).items():
                parts[name].append(values)
            parts["coarse"].append(self._coarse(coarse, batch, pair))
        self._remember(maps, coarse, batch)
        terms = {name: _mean(values, maps) for name, values in parts.items()}
        total = terms["fine"] + terms["coarse"] + self.joint_weight * terms["joint"]
        return {"total": total, **terms}

    def _fine(self, views: SAMMaps, cells: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of a pair's anchors in both directions: the fine and joint losses, and matching errors."""
        places = cells["fine_mm"].flatten(0, 1)
        count, dim, past = len(places) // 2, views.fine.shape[1], self.past_fine
        drawn = cells["fine_candidates"]
        keys = torch.cat([both_at(views, drawn), past.vectors])  # (M, 2C)
        key_mm = torch.cat([places[drawn], past.places_mm])
        key_spaces = torch.cat([cells["space"].expand(len(drawn)), past.spaces])
        found: dict[str, list[Tensor]] = {"fine": [], "joint": [], "error_mm": []}
        for view in (0, 1):
            match = cells["fine_match"][view]
            match = match[match[:, 0] >= 0]
            if not len(match):
                continue
            here, there = match[:, 0] + view * count, match[:, 1] + (1 - view) * count
            anchor, counterpart = both_at(views, here), both_at(views, there)  # (A, 2C)
            fine = anchor[:, :dim] @ keys[:, :dim].T  # (A, M)
            joint = (fine + anchor[:, dim:] @ keys[:, dim:].T) / 2
            with torch.no_grad():
                near = _distance(places[here], key_mm) < self.exclusion_mm
                excluded = (key_spaces < 0) | (near & (key_spaces == cells["space"]))
                columns, real = hardest(joint, excluded, self.ranked, self.negatives)
                found["error_mm"].append(
                    self._errors(views, cells, 1 - view, anchor[:MEASURED], places[here[:MEASURED]])
                )
            positive = (anchor * counterpart)[:, :dim].sum(1)
            positive_joint = (anchor * counterpart).sum(1) / 2
            for name, similar, negative in (("fine", positive, fine), ("joint", positive_joint, joint)):
                negative = negative.gather(1, columns).masked_fill(~real, -torch.inf)
                found[name].append(info_nce(similar, negative, self.temperature))
        return {name: torch.cat([keys.new_zeros(0), *values]) for name, values in found.items()}

    def _errors(
        self, views: SAMMaps, cells: dict[str, Tensor], other: int, anchor: Tensor, place_mm: Tensor
    ) -> Tensor:
        """How far the best matches of anchors in the other view lie from them, mm."""
        dim, sizes = views.fine.shape[1], views.fine.shape[2:]
        fine = anchor[:, :dim] @ unit_length(cells_of(views.fine)[other]).T
        coarse = anchor[:, dim:] @ cells_of(views.coarse)[other].T
        similar = F.interpolate(
            coarse.reshape(1, -1, *views.coarse.shape[2:]), size=sizes, mode="trilinear", align_corners=False
        )
        score = (fine + similar[0].flatten(1)).masked_fill(~cells["fine_inside"][other], -torch.inf)
        return (cells["fine_mm"][other][score.argmax(dim=1)] - place_mm).norm(dim=1)

    def _coarse(self, coarse: Tensor, batch: dict[str, Any], pair: int) -> Tensor:
        """Losses of a pair's coarse anchors; every cell of the batch and the memory is a possible negative."""
        count, past = coarse.shape[1], self.past_coarse
        flat = coarse.flatten(0, 1)
        places, inside = batch["coarse_mm"].flatten(0, 2), batch["coarse_inside"].flatten()
        spaces = batch["space"].repeat_interleave(2 * count).where(inside, -1)
        keys, key_mm = torch.cat([flat, past.vectors]), torch.cat([places, past.places_mm])
        key_spaces = torch.cat([spaces, past.spaces])
        losses = []
        for view in (0, 1):
            match = batch["coarse_match"][pair, view]
            match = match[match[:, 0] >= 0]
            if not len(match):
                continue
            start = 2 * pair * count
            here, there = start + match[:, 0] + view * count, start + match[:, 1] + (1 - view) * count
            near = _distance(places[here], key_mm) < self.coarse_exclusion_mm
            excluded = (key_spaces < 0) | (near & (key_spaces == batch["space"][pair]))
            excluded.scatter_(1, there[:, None], True)  # the counterpart is the positive, however far it is
            negative = (flat[here] @ keys.T).masked_fill(excluded, -torch.inf)
            losses.append(info_nce((flat[here] * flat[there]).sum(1), negative, self.temperature))
        return torch.cat([flat.new_zeros(0), *losses])

    @torch.no_grad()
    def _remember(self, maps: SAMMaps, coarse: Tensor, batch: dict[str, Any]) -> None:
        """Keep all coarse cells of the batch, and of the candidates of each pair the first."""
        inside = batch["coarse_inside"].flatten()
        spaces = batch["space"].repeat_interleave(2 * coarse.shape[1])
        self.past_coarse.put(
            coarse.flatten(0, 1)[inside], batch["coarse_mm"].flatten(0, 2)[inside], spaces[inside]
        )
        for pair, space in enumerate(batch["space"]):
            drawn = batch["fine_candidates"][pair, : self.remembered]
            views = SAMMaps(*(level[2 * pair : 2 * pair + 2] for level in maps))
            places = batch["fine_mm"][pair].flatten(0, 1)
            self.past_fine.put(both_at(views, drawn), places[drawn], space.expand(len(drawn)))


def _distance(points: Tensor, others: Tensor) -> Tensor:
    """(A, N) mm between (A, 3) and (N, 3), in the precise way."""
    return torch.cdist(points, others, compute_mode="donot_use_mm_for_euclid_dist")


def cells_of(maps: Tensor) -> Tensor:
    """(V, C, z, y, x) -> (V, N, C)."""
    return maps.flatten(2).transpose(1, 2)


def both_at(views: SAMMaps, cells: Tensor) -> Tensor:
    """Fine and interpolated coarse vectors, each of length 1, of some cells only; the loss needs few of them.

    Args:
        views: maps (2, C, z, y, x) of a pair; the fine one need not have length 1.
        cells: (n,) of both views, the second's counted on from the first's.

    Returns:
        (n, 2C).
    """
    sizes = views.fine.shape[2:]
    count = sizes[0] * sizes[1] * sizes[2]
    view, cell = cells // count, cells % count
    fine = unit_length(_rows(views.fine, cells))
    # the corners of trilinear interpolation between the middles of coarse cells, as F.interpolate has them
    middles = (cell // (sizes[1] * sizes[2]), cell // sizes[2] % sizes[1], cell % sizes[2])
    index, weight = view[:, None], fine.new_ones(len(cells), 1)
    for middle, size, number in zip(middles, sizes, views.coarse.shape[2:], strict=True):
        at = ((middle + 0.5) * (number / size) - 0.5).clamp(0, number - 1)
        low = at.floor().long()
        corners = torch.stack([low, (low + 1).clamp(max=number - 1)], dim=1)
        share = torch.stack([1 - (at - low), at - low], dim=1).to(weight.dtype)
        index = (index[:, :, None] * number + corners[:, None]).flatten(1)
        weight = (weight[:, :, None] * share[:, None]).flatten(1)
    context = (_rows(views.coarse, index) * weight[..., None]).sum(dim=1)
    return torch.cat([fine, unit_length(context)], dim=1)


def _rows(maps: Tensor, cells: Tensor) -> Tensor:
    """Vectors (..., C) of some cells (...) of maps (B, C, z, y, x).

    As an embedding, whose gradient is summed in one order; that of indexing is summed by several threads in any, and no run
    could then be repeated to the bit.
    """
    return F.embedding(cells, cells_of(maps).flatten(0, 1))


def _mean(parts: list[Tensor], maps: SAMMaps) -> Tensor:
    """The mean over all anchors; 0, with a gradient of 0 to both maps, where no cell had a counterpart."""
    values = torch.cat(parts)
    return values.mean() if len(values) else (maps.fine.float().sum() + maps.coarse.sum()) * 0.0
