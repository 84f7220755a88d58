"""The depth tokenizer: its teacher, its training, its evaluation and its export."""
