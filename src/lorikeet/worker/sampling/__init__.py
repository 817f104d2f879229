"""From logits to tokens, and from hidden states to vectors."""
