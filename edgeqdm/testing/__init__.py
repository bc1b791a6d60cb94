"""What tests of this package, and of others that build on it, share."""
