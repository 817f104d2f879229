"""The loop, the process around it, and what its clients use: text in, text out."""
