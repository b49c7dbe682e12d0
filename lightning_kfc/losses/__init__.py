"""Which likelihood a loss is the negative logarithm of."""
