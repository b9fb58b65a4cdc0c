"""`python -m bbn_backdoorbench.dp_sgd` runs our dp_sgd as a defense of BackdoorBench."""

import sys

from bbn_backdoorbench.as_defense import main

if __name__ == "__main__":
    sys.exit(main("dp_sgd"))
