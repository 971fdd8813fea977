"""`python -m streamrepair`."""

import sys

from streamrepair.entry import main

sys.exit(main())
