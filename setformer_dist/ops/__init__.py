"""Pure tensor functions of the models: kernels, optimal transport, set attention. No state, files or ranks."""
