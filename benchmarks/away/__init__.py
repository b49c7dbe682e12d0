"""A benchmark that cannot be tuned to: half of its tasks choose constants, the others are run once at the end."""
