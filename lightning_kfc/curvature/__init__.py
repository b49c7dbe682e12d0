"""The layers of a model, with their factors and inverses."""
