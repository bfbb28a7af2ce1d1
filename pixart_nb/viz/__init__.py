"""Views: NumPy arrays in, matplotlib figures or HTML out. Knows nothing of MindSpore."""
