"""Encoders: MONAI's networks that compute visible tokens only, and nnFormer."""
