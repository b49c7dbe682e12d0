"""Ways to step: gradients and inverses in, updates out."""
