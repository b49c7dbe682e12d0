"""The costs of steps, reviews, layers and numbers."""
