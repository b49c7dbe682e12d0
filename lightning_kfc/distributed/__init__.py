"""On which rank things are, and what ranks send each other."""
