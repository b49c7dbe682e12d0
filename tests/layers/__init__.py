"""Tests of the adapters, a file a kind."""
