"""A Hugging Face causal LM as the method needs it: loaded, taken apart into body and head, attending as asked."""
