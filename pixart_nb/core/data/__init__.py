"""Data sets: label files, imports, aspect-ratio buckets, batches and the feature cache."""
