"""Text → token files → batches. Imports no torch."""

from collections.abc import Callable

Say = Callable[[str], None]
"""Takes one line that the user should read."""
