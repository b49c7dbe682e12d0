"""What steps, reviews, layers and numbers cost."""
