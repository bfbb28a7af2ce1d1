"""The three networks of a PixArt pipeline: the transformer, the T5 text encoder and the autoencoder."""
