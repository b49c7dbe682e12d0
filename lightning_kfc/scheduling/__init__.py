"""Dates of statistics and inverses."""
