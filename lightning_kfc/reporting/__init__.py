"""Shows what a training did, and changes nothing."""
