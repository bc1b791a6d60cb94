"""Frozen types of everything that is stored or crosses a floor."""
