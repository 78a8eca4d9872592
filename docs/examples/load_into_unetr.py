"""Load a pre-trained encoder into stock MONAI UNETR: python docs/examples/load_into_unetr.py encoder.safetensors"""

import sys

import torch
from monai.networks.nets import UNETR

from custom.transfer.encoder_weights import load_encoder, read_weights

path = sys.argv[1]
settings = read_weights(path)[1]["network"]  # the file says what it was trained as

network = UNETR(
    in_channels=1,
    out_channels=14,
    img_size=settings["img_size"],
    hidden_size=settings["hidden_size"],
    mlp_dim=settings["mlp_dim"],
    num_heads=settings["num_heads"],
)
load_encoder(network, path)  # fills every tensor of network.vit, or raises
print("logits:", tuple(network(torch.rand(1, 1, *settings["img_size"])).shape))
