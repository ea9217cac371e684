"""The two ways sharefold talks to its user when something is off."""


class SharefoldError(Exception):
    """Bad input or an impossible request: one line that says what, where and what to do (command line: exit code 2)."""


class SharefoldWarning(UserWarning):
    """Something was ignored or adjusted; the result is still valid."""
