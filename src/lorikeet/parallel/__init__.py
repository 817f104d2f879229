"""Tensor parallelism as an object that is passed in, never a global."""
