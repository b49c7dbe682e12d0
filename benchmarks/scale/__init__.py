"""The costs with many ranks."""
