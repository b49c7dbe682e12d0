"""Collectives, and the placement of layers on ranks."""
