"""`python -m streamrepair`."""

import sys

from streamrepair.cli import main

sys.exit(main())
