"""The drawn world: scenes, captions, their evaluator, and the training of the bundled model."""
