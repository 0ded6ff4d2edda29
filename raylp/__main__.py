"""`python -m raylp`."""

from raylp.cli import main

main()
