"""placeholder"""


def run() -> None:
    """run."""
