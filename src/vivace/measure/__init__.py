"""How good a model's answers still are, measured on given text."""
