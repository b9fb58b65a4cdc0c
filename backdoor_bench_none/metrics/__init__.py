"""Extra metrics of the theory behind NONE: how complete and accurate a Trojan is, and how curved the loss."""
