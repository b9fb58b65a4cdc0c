"""What a run leaves behind: one JSON record per cell, and the artifacts its stages share."""
