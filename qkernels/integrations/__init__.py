"""Bridges to code that does not call qkernels itself."""
