"""Fine-tune language models by layer sampling and low-rank gradients, with optimizer state in 8 bits."""
