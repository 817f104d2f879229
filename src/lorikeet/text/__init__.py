"""Text in and out: tokenizers, chat templates, stop strings, and completions as they grow. No torch here."""
