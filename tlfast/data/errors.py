"""The error for input that the user has to mend."""


class InputError(ValueError):
    """Bad input from the user: a file, a folder, a setting. The message is one line: what is wrong and how to fix it.

    Commands print it without a traceback and exit with status 2; every other exception is a mistake in the code.
    """
