"""How the default model, `tiny`, is made: data, exercises, tokenizer, trainer, evaluation."""
