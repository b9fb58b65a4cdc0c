"""From a plan to records: the stages of a cell, the jobs they are packed into, and their progress."""
