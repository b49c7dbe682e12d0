"""From a batch to the statistics of every layer."""
