"""Networks that run on visible tokens only, with MONAI's own parameters."""
