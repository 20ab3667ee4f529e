"""The one error family of the library. A message names the object, what was found, what was expected, what to do."""


class LDMQError(ValueError):
    """Base of every error this library raises on purpose."""


class RecordingError(LDMQError):
    """A pipeline could not be recorded or a recording could not be replayed."""


class PlanError(LDMQError):
    """A profile, plan or target is malformed, belongs to another model, or cannot be met."""


class TargetError(PlanError):
    """A target that no plan of the planner meets."""


class CalibrationError(LDMQError):
    """Calibration saw no data, or data that gives no usable range."""


class VerificationError(LDMQError):
    """The quantized model gives no usable output."""


class CheckpointError(LDMQError):
    """A saved quantized model is incomplete, damaged, or of another format version."""


class BackendError(LDMQError):
    """No backend can run a layer as its scheme asks."""


class EvaluationError(LDMQError):
    """Pictures, or what they are to be measured with, cannot be used."""


class OutputError(LDMQError):
    """A result could not be written where the user asked for it."""


def place(key: str) -> str:
    """A tensor's name in words."""
    module, _, tensor = key.rpartition(".")
    return f"module {module!r}, tensor {tensor!r}" if module else f"tensor {tensor!r}"
