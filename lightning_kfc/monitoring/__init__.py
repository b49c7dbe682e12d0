"""Events, times and advice."""
