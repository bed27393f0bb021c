"""The one exception that the command line turns into a message instead of a traceback."""


class UserError(Exception):
    """What the user gave cannot work. The message carries the numbers, the rule and the fix."""
