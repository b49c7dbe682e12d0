"""Rows to factors, factors to running averages, running averages to inverses: tensors only."""
