"""Numbers, pictures and the report of a training."""
