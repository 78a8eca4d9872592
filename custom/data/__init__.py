"""From scans to a chunked store."""
