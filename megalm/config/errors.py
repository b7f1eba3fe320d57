"""The one exception that means "the person's input is wrong": printed as a message, exit status 2, no traceback."""


class ConfigError(Exception):
    """Configuration or input that cannot be used.

    The message says what was wrong with its value, what is allowed, and what to do next.
    """
