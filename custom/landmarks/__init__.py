"""Find the same anatomical point in another patient's scan."""
