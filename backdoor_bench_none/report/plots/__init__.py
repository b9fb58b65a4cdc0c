"""Pictures for papers: each kind has a module of its own that prepares numbers, and draws them."""
