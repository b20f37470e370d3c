"""What a rate is called."""


def slug(p: float) -> str:
    """In files and logs."""
    return f"p{p:g}" if p else "without"


def label(p: float) -> str:
    """In tables and figures."""
    return f"p = {p:g}" if p else "without"


def described(p: float) -> str:
    """In a sentence."""
    return f"p = {p:g}" if p else "without stochastic depth"
