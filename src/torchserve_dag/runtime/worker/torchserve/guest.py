"""All that a guest does (see `sharing.py`): wait until its host ends. Run by its path, with the link's descriptor."""

import os
import sys

if __name__ == "__main__":
    os.read(int(sys.argv[1]), 1)
