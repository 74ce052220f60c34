"""The one exception that means "the user can fix this": the command prints it as one line and exits with 2."""


class UserError(ValueError):
    """A mistake in a flag, a file or a configuration. The message says what is wrong, where, and what to do."""


def reason_of(error: Exception) -> str:
    """Kind and message of an error in one line, cut where it gets long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
