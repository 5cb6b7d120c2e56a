"""What l2o raises on bad input; every message says what came, what was expected and the way out."""


class L2OError(Exception):
    """Base of every error that l2o raises on bad input."""


class UnknownNameError(L2OError, LookupError):
    """A rule, task, estimator or checkpoint of that name does not exist."""


class CheckpointError(L2OError, ValueError):
    """A checkpoint of meta-parameters is truncated, corrupt, or belongs to another rule."""


class ResumeError(L2OError, ValueError):
    """A resume file is damaged, foreign, or of another format version."""


class RunConflictError(L2OError, ValueError):
    """A run is to be continued under a configuration that differs from its own."""


class ConfigurationError(L2OError, ValueError):
    """A setting has a value that makes no sense, such as ``total_steps=0``."""


class WriteError(L2OError, OSError):
    """A run cannot be written: the disk is full, or the folder takes no files."""


class ParameterError(L2OError, TypeError):
    """A parameter cannot be optimized: it is not a floating-point tensor, or lies on another device than the rest."""


class GradientError(L2OError, RuntimeError):
    """A gradient is sparse or complex, or its shape or device is not its parameter's."""


class DataError(L2OError, OSError):
    """A data set is missing, damaged, or cannot be downloaded."""


class DownloadError(L2OError, OSError):
    """An address cannot be reached, or serves something else than was expected."""
