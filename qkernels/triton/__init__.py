"""Triton kernels, one module for each op family. Nothing here is imported before the first call that needs it.

Set TRITON_INTERPRET=1 before Python starts to run them on CPU tensors, slowly, for debugging.
"""
