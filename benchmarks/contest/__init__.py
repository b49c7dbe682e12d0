"""The contest of optimizers for the least time to a loss, with its ablations."""
