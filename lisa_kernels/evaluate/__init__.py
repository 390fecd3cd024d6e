"""How good a model's answers are: held-out loss, and accuracy where rows have choices, with confidence intervals."""
