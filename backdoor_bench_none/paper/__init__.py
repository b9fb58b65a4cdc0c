"""The paper's experiments: what its rows and figures are, and their benchmark files."""
