"""Network architectures with any activation function, and the activation functions."""
