"""From a quantized model to a package: written whole or not at all, and checkable afterwards."""
