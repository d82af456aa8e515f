"""The errors a user can cause, and the exit code each one means."""


class ClinkdError(Exception):
    """Something that a person can mend; shown as one line, without a traceback."""

    exit_code = 1


class ConfigError(ClinkdError, ValueError):
    """A wrong key, value or argument."""

    exit_code = 2


class DataError(ClinkdError, ValueError):
    """A record, an image or a file that cannot be used."""

    exit_code = 3


class SetupError(ClinkdError):
    """This machine lacks what was asked for: a package, a device, disk space, a permission."""

    exit_code = 4


class Preempted(ClinkdError):
    """Stopped by a signal after everything was saved; start again to go on."""

    exit_code = 75
