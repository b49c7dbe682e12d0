"""How long a step may be, and how much is damped."""
