"""The likelihoods of losses."""
