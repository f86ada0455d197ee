"""Imported by every Python that has this folder on its path: arms the faults of a worker that a launcher started."""

import os
import sys
from pathlib import Path

if "RANK" in os.environ:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import faults

    faults.install()
