"""From statistics to factors and inverses, over all ranks."""
