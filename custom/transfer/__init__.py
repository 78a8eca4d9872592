"""Load and save weights, completely or not at all."""
