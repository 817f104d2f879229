"""Pure tensor functions: each has a torch form and, where it pays, a Triton form."""
