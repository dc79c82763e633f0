"""One file an operation: its schema, its reference in plain PyTorch, fake rule, autograd, and choice of backend."""
