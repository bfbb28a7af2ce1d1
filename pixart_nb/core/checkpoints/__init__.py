"""Reading and writing checkpoints: published layouts, name tables, crash-safe files."""
