"""The modules of an example are imported as its own script does: from their folder."""

import sys
from pathlib import Path

for example in ("demo", "cleaning", "debian", "polyglot-assistant"):
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / example))
