"""`python -m streamrepair`."""

from streamrepair.entry import main

main()
