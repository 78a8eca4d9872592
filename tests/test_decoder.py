"""The light decoder: tokens on their places, mask tokens where tokens are hidden."""

import pytest
import torch

from custom.encoders.positions import sincos_positions
from custom.errors import AliceError
from custom.methods.decoder import Decoder

GRID = (2, 3, 1)


def decoder(depth):
    torch.manual_seed(0)
    return Decoder(in_width=5, patch_voxels=8, width=12, depth=depth, num_heads=2).eval()


def test_visible_tokens_keep_their_places_and_mask_tokens_fill_the_others():
    net, visible = decoder(depth=0), torch.randn(2, 2, 5)
    torch.nn.init.normal_(net.mask_token)
    hidden = torch.ones(2, 6, dtype=torch.bool)
    hidden[0, [1, 4]] = False  # a sample's visible tokens, in grid order
    hidden[1, [0, 5]] = False
    expected = net.mask_token.expand(2, 6, 12).clone()
    expected[0, [1, 4]] = net.embed(visible[0])
    expected[1, [0, 5]] = net.embed(visible[1])
    expected = net.norm(expected + sincos_positions(GRID, 12))
    torch.testing.assert_close(net(visible, GRID, hidden.view(2, *GRID)), expected)


def test_every_token_visible_needs_no_mask_token():
    net, tokens = decoder(depth=2), torch.randn(2, 6, 5)
    nothing_hidden = torch.zeros(2, *GRID, dtype=torch.bool)
    torch.testing.assert_close(net(tokens, GRID, None), net(tokens, GRID, nothing_hidden))


def test_a_visible_token_reaches_the_hidden_ones():
    net, visible = decoder(depth=1), torch.randn(1, 2, 5)
    hidden = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool).view(1, *GRID)
    changed = visible + torch.tensor([[[1.0], [0.0]]])
    before, after = net(visible, GRID, hidden), net(changed, GRID, hidden)
    assert (before != after).any(dim=-1).all()


@pytest.mark.parametrize("width, heads", [(100, 7), (100, 5), (12, 5), (12, 0)])
def test_a_width_that_heads_or_positions_do_not_divide_is_named(width, heads):
    with pytest.raises(AliceError, match=f"decoder_width = {width} must be .* decoder_heads = {heads}"):
        Decoder(in_width=5, patch_voxels=8, width=width, depth=1, num_heads=heads)
