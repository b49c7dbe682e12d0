"""Checks and contexts that know nothing of KFC."""
