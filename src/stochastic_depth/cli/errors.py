"""What the user can put right."""


class CommandError(Exception):
    """Bad input, told in one line: the argument, the value it got, and what to do."""


def first_line(error: Exception) -> str:
    """The beginning of another library's long message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
