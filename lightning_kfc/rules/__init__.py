"""From gradients and inverses to updates."""
