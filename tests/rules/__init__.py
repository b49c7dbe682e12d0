"""Tests of lightning_kfc.rules."""
