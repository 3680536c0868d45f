"""What ends a command early: the mistakes of a user, and the ways in which a run stops by itself."""


class UserError(Exception):
    """Something the user can put right: the command prints it on one line and exits with 2.

    The message says what is wrong, where, what is allowed, and what to do.
    """


class ConfigError(UserError):
    """A configuration key that is unknown, of the wrong type, or of an impossible value."""

    def __init__(self, key: str, value: object, allowed: str):
        super().__init__(f"config key {key} = {value!r}: {allowed}")
        self.key = key


class MissingExtraError(UserError):
    """A feature whose optional package is not installed."""

    def __init__(self, feature: str, package: str, extra: str):
        super().__init__(f'{feature} needs the package {package!r}: pip install "opus-jax[{extra}]"')


class InterruptedRunError(Exception):
    """The run was asked to stop by hand, and stopped after a clean save."""


class PreemptedRunError(InterruptedRunError):
    """The machine is being taken away (SIGTERM): the run stopped after a clean save, and may be started again."""


class NonFiniteLossError(RuntimeError):
    """The training loss became infinite or not a number; the checkpoints before that are intact."""


class LostProcessError(RuntimeError):
    """Another process of the run has gone: all of them have to be started again."""


class JoinError(RuntimeError):
    """The processes of a run did not come together; trying again may help."""
