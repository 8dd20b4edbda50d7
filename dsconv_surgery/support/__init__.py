"""Support code that knows nothing of compression: copies, comparisons, timing, distributed, cache, files, records, text, plots."""
