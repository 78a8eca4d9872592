"""Weights in and out, whole or not at all."""
