"""One rank of the model: executes plans and samples tokens."""
