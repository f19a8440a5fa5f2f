"""Reading prompts and continuing them, a token at a time."""
