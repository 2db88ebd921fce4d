"""The errors that a user can cause and mend. Commands print their message on one line and exit with code 2."""


class UkbobError(Exception):
    """Base of every error whose message alone tells the user what is wrong and what to do."""


class DatasetError(UkbobError):
    """The data on disk (raw, preprocessed, predictions) is not as it must be."""


class ConfigError(UkbobError):
    """An option, a plan or a configuration value is not valid."""


class CheckpointError(UkbobError):
    """A checkpoint or model folder cannot be used."""


class StoppedError(UkbobError):
    """A signal asked the program to stop, and it did so in good order. Commands exit with code 143."""
