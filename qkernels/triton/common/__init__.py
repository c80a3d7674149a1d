"""Tools that several ops in Triton use; qkernels/triton itself holds one module for each op family."""
