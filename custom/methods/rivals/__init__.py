"""Other methods of Alice's Table 1, on the same encoders, scans and engine: one module each."""
