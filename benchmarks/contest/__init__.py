"""Which optimizer reaches a loss first: the contest, its ablations, and what they share."""
