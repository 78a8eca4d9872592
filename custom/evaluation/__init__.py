"""What an encoder is worth: probes, metrics, statistics."""
