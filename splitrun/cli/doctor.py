"""placeholder"""


def doctor() -> None:
    """doctor."""
