"""`python -m beear`."""

from beear.cli import main

main()
