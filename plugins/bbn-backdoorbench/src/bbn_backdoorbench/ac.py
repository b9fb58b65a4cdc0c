"""`python -m bbn_backdoorbench.ac` runs our ac as a defense of BackdoorBench."""

import sys

from bbn_backdoorbench.as_defense import main

if __name__ == "__main__":
    sys.exit(main("ac"))
