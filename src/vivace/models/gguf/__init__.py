"""What a GGUF file says about a model, as the rest of vivace understands it."""
