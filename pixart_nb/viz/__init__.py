"""Figures, widgets and HTML pages from NumPy arrays. Imports no MindSpore."""
