"""What the user can put right, and what the user did."""


class CommandError(Exception):
    """Bad input, told in one line: the argument, the value it got, and what to do."""


class Interrupted(Exception):
    """Ctrl-C, and how to continue."""


def first_line(error: BaseException) -> str:
    """The beginning of another library's long message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
