"""Whole recipes: augmentation, weight decay, schedule, averaged weights and a validation metric, as people train."""
