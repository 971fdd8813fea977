"""Examples are the same on every run, so that a red test says something of the change and not of the dice.

`pytest --hypothesis-profile=search` draws new ones; a case found that way belongs into the test as an `@example`.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("fixed")
