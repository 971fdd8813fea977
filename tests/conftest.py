"""Examples are the same on every run, so that a red test says something of the change and not of the dice.

`pytest --hypothesis-profile=search` draws new ones; a case found that way belongs into the test as an `@example`.

No test sees a GPU: most leave the device to `auto`, and what they hold of budgets, workers and bytes is the CPU's.
"""

from __future__ import annotations

import os

from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # heeded by torch, which is loaded after this, and by commands that tests start

settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("fixed")
