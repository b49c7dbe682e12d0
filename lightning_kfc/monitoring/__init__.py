"""What happened, as numbers and sentences."""
