"""Out-of-core spectral repair of fine-tuned checkpoints under a stated memory budget."""

from streamrepair.api import plan, repair, verify
from streamrepair.errors import StreamRepairError
from streamrepair.version import __version__

__all__ = ["StreamRepairError", "__version__", "plan", "repair", "verify"]
