"""The bound on steps, and the damping."""
