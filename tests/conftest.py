"""Settings of all tests."""

from __future__ import annotations

import hypothesis

# Reproducible examples, no deadline (the machine may be busy), and no folder of past examples in the checkout.
hypothesis.settings.register_profile("megapoly", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("megapoly")
