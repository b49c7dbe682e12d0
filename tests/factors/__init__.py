"""Tests of lightning_kfc.factors."""
