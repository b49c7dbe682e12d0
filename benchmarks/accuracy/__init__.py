"""What approximations lose."""
