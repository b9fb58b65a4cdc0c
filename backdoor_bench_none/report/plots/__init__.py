"""Pictures for papers: a module for each kind, which prepares its numbers and draws them."""
