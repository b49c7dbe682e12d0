"""What is kept of each layer, and which layers there are."""
