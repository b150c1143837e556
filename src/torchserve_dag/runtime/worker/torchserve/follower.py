"""What a follower runs (see `sharing.py`): wait until its leader ends. The argument is the link's descriptor."""

import os
import sys

if __name__ == "__main__":
    os.read(int(sys.argv[1]), 1)
