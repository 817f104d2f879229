"""What is decided about adapters: names, versions, places, limits. No torch here, and never a byte of weights."""
