"""Parts of `scripts/train_demo.py`: the text made from the facts, the models, the loop, the scores."""
