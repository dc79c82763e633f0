"""One folder an operation: schema, reference in plain PyTorch, fake rule, autograd, choice of backend, and backends."""
