"""The command `beear`: prints and exit codes, nothing else.

0 done; 1 failed (or interrupted); 2 bad input; 3 done, but a target, a limit or a comparison was missed.
Heavy modules are imported inside commands, so that --help answers at once.
"""

from beear.cli.entry import main

__all__ = ["main"]
