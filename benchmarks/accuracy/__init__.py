"""Errors of approximations."""
