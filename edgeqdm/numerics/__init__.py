"""Pure numerics: tensors in, tensors out, no state and no files."""
