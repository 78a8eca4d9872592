"""Conditional anatomical semantic alignment: the target's tokens seen through the student's visible ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
