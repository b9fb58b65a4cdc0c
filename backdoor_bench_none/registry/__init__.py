"""Which components there are, and which plugin provides each."""
