"""Helpers that know nothing of compression: copies, comparisons, latency, records, text, files and processes."""
