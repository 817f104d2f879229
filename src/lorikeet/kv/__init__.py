"""K/V pages: who holds which page, what is cached under which prefix, and the tensors behind them."""
