"""The paper's experiments: benchmark files for its tables and figures, and the drawing of its figures."""
