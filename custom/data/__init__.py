"""From scans to a chunked store, to aligned pairs of crops, to views."""
