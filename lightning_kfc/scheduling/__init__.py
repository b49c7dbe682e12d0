"""When statistics and inverses are due."""
