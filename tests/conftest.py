"""Examples are the same on every run, so that a red test says something of the change and not of the dice.

`pytest --hypothesis-profile=search` draws new ones; a case found that way belongs into the test as an `@example`.

No test sees a GPU: most leave the device to `auto`, and what they hold of budgets, workers and bytes is the CPU's. Nor
do they see speeds that were measured on this machine.

Signals that are ignored when the tests start, as Ctrl-C is in a shell's background, are heeded again: the commands that
tests start would inherit it, and leave it at that.
"""

from __future__ import annotations

import os
import signal
import tempfile

from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # heeded by torch, which is loaded after this, and by commands that tests start
_cache = tempfile.TemporaryDirectory(prefix="cache-of-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

settings.register_profile("fixed", derandomize=True)
settings.register_profile("search", derandomize=False)
settings.load_profile("fixed")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
