"""Network architectures with a free activation function, and what can be read off their neurons."""
