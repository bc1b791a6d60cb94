"""How good and how fast a package is, measured."""
