"""The modules of an example are imported as its own script does: from their folder."""

import sys
from pathlib import Path

for example in ("polyglot-assistant", "cleaning", "debian", "demo"):  # `run` is the demo's
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / example))
