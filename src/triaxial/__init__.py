"""Triaxial: plan, run and measure transformers spread over many GPUs.

The package root holds only what every part shares: the version and the ways a command can end badly.
"""

__version__ = "0.1.0"


class BadInput(ValueError):
    """The caller's input is wrong: one sentence that names the fix. The command line exits with 2."""


class NoAnswer(Exception):
    """The question was valid and the answer is no (does not fit, check failed). Exit code 1."""


class Ended(NoAnswer):
    """There is no answer because a signal has asked this program to end."""
