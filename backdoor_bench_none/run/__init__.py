"""How a plan becomes records: the stages, the jobs they are packed into, and their progress."""
