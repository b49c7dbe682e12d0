"""Second moments of a convolution's patches, and where they lie in its input."""
