"""A richer drawn world: vector drawings in unit coordinates, rendered at any size and quantised to palettes."""
