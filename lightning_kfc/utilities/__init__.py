"""Checks and contexts that are independent of KFC."""
