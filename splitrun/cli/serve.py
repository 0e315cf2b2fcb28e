"""placeholder"""


def serve() -> None:
    """serve."""
