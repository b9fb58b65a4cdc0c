"""From a benchmark file to checked cells and their stages."""
