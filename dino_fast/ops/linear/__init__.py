"""Linear layers of the models: the matrix product, the normalised rows and the MLP, fused on a CPU."""
