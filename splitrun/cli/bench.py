"""placeholder"""


def bench() -> None:
    """bench."""
