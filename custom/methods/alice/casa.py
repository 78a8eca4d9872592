"""Conditional anatomical semantic alignment: the target's tokens seen through the student's visible ones; and alternatives."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from custom.errors import AliceError


class CASA(nn.Module):
    """Single-head cross attention without residual (Alice, Eq. 3-4).

    ``q = LN(V) W_q``, ``k = LN(H) W_k``, ``v = LN(H) W_v``, ``S = zeta(softmax(q k^T / sqrt(C)) v)``; for T the
    context is Y in place of H and every weight is the same.

    Args:
        visible_width: channels of the student encoder's tokens V.
        context_width: channels of H and Y.
        width: channels C of query, key and value, and of S and T (ours: 256, the projector's bottleneck).
    """

    def __init__(self, visible_width: int, context_width: int, width: int = 256) -> None:
        super().__init__()
        self.norm_visible = nn.LayerNorm(visible_width)
        self.norm_context = nn.LayerNorm(context_width)
        self.query = nn.Linear(visible_width, width, bias=False)
        self.key = nn.Linear(context_width, width, bias=False)
        self.value = nn.Linear(context_width, width, bias=False)
        self.zeta = nn.Linear(width, width)
        self.out_width = width

    def forward(self, visible: Tensor, context: Tensor) -> Tensor:
        """Align context tokens with visible ones.

        Args:
            visible: V, (B, N_visible, visible_width).
            context: H or Y, (B, N, context_width).

        Returns:
            S or T, (B, N_visible, width).
        """
        context = self.norm_context(context)
        query, key, value = self.query(self.norm_visible(visible)), self.key(context), self.value(context)
        return self.zeta(F.scaled_dot_product_attention(query, key, value))

    def attention(self, visible: Tensor, context: Tensor) -> Tensor:
        """The attention map (B, N_visible, N), rows summing to 1: where each visible token looks."""
        query, key = self.query(self.norm_visible(visible)), self.key(self.norm_context(context))
        return torch.softmax(query @ key.transpose(1, 2) / math.sqrt(query.shape[-1]), dim=-1)


class MultiheadCASA(CASA):
    """CASA with several heads, still without residual (ours). With one head it is CASA, bit for bit.

    Args:
        visible_width, context_width, width: as of :class:`CASA`; ``heads`` divides the last.
        heads: of the attention.

    Raises:
        AliceError: if it does not.
    """

    def __init__(self, visible_width: int, context_width: int, width: int = 256, heads: int = 8) -> None:
        super().__init__(visible_width, context_width, width)
        if width % heads:
            raise AliceError(
                f"alignment multihead: the bottleneck of {width} is not divisible by {heads} heads."
            )
        self.heads = heads

    def forward(self, visible: Tensor, context: Tensor) -> Tensor:
        """As :meth:`CASA.forward`."""
        if self.heads == 1:
            return super().forward(visible, context)
        context = self.norm_context(context)
        parts = self.query(self.norm_visible(visible)), self.key(context), self.value(context)
        split = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.zeta(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


class Nearest(nn.Module):
    """Each visible token takes the context token of the highest cosine (a hard match, as in DenseCL). No parameters."""

    def forward(self, visible: Tensor, context: Tensor) -> Tensor:
        """phi(V) (B, N_visible, D), H or Y (B, N, D) -> S or T (B, N_visible, D)."""
        best = cosines(visible, context).argmax(dim=2)
        return context.gather(1, best[:, :, None].expand(-1, -1, context.shape[2]))


class Sinkhorn(nn.Module):
    """Each visible token takes a mean of context tokens, weighted by an entropic transport plan of cosines. No parameters.

    Every visible token sends equally much and every context token receives equally much (Cuturi, 2013).

    Args:
        epsilon: of the entropy (ours).
        iterations: each scales rows, then columns (ours).
    """

    def __init__(self, epsilon: float = 0.05, iterations: int = 3) -> None:
        super().__init__()
        self.epsilon, self.iterations = epsilon, iterations

    def forward(self, visible: Tensor, context: Tensor) -> Tensor:
        """phi(V) (B, N_visible, D), H or Y (B, N, D) -> S or T (B, N_visible, D)."""
        return self.plan(cosines(visible, context)).to(context.dtype) @ context

    def plan(self, similarity: Tensor) -> Tensor:
        """Cosines (B, N_visible, N) -> weights of the same shape, ``N_visible`` times the plan."""
        log_plan = similarity.float() / self.epsilon
        received = math.log(similarity.shape[1] / similarity.shape[2])
        for _ in range(self.iterations):
            log_plan = log_plan - log_plan.logsumexp(dim=2, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(dim=1, keepdim=True) + received
        return log_plan.exp()


def cosines(visible: Tensor, context: Tensor) -> Tensor:
    """(B, N_visible, D), (B, N, D) -> (B, N_visible, N)."""
    return F.normalize(visible, dim=-1) @ F.normalize(context, dim=-1).transpose(1, 2)


class OfficialCASA(nn.Module):
    """The authors' code: 8 heads, residual from the query, post-norm, feed-forward, dropout 0.1.

    Its query is the student's tokens after the head, so query and context have one width. The projections
    that the authors define and never use are left out.
    """

    def __init__(
        self, width: int = 512, num_heads: int = 8, mlp_width: int = 2048, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.attention_block = nn.MultiheadAttention(
            width, num_heads, dropout=dropout, bias=False, batch_first=True
        )
        self.norm_attention = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.ReLU(), nn.Linear(mlp_width, width), nn.Dropout(dropout)
        )
        self.dropout = nn.Dropout(dropout)
        self.norm_mlp = nn.LayerNorm(width, eps=1e-6)
        self.out_width = width

    def forward(self, visible: Tensor, context: Tensor) -> Tensor:
        """V after the head (B, N_visible, width), H or Y (B, N, width) -> S or T (B, N_visible, width)."""
        attended, _ = self.attention_block(visible, context, context, need_weights=False)
        aligned = self.norm_attention(visible + self.dropout(attended))
        return self.norm_mlp(aligned + self.mlp(aligned))
