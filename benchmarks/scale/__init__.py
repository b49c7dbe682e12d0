"""What many ranks cost."""
