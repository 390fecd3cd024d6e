"""Pure functions on tensors, one folder per operation: contract, definition and kernels."""
