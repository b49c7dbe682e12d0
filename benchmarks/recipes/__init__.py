"""Whole recipes, with augmentation, weight decay, schedule, averaged weights and a validation metric."""
