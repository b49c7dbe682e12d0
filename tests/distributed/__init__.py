"""Tests with real processes: a pool of ranks is started once and runs many cases."""
