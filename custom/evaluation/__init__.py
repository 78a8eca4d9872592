"""Measure encoders and segmentations: probes, scores, statistics."""
