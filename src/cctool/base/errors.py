"""Every error that cctool raises on purpose.

CctoolError                     exit 1, one line on stderr
├── UsageError                  exit 2: options that contradict each other or lie outside their range
├── CheckpointError             a file that is not what it should be
│   ├── UnsafeCheckpointError   only pickle could read it, and pickle runs code
│   ├── CorruptCheckpointError  truncated, bit-flipped or inconsistent
│   └── SpecError               the spec cannot be built, or the tensors do not back it
├── ArchitectureError           unknown architecture, or arguments that it does not take
├── DataError                   a data set that is missing, damaged or unknown
├── UserCodeError               a function named by the user failed or returned the wrong thing
├── TrainingError               training cannot start or continue
│   └── DivergedError           the loss became NaN or infinite
├── PruningError                nothing can be cut, or the cut network does not equal the masked one
├── QuantizationError           a tensor or layer that a method cannot take
├── TransformError              a layer or feature map that a transform cannot take
├── BitstreamError              a coded stream that is truncated or altered
├── ExportError                 the exported model does not compute what the model does
└── DeviceError                 the device or precision asked for is not available

A message is one line: the value, what is allowed, and the way out. For example::

    try:
        checkpoint = cctool.load("student.pt")
    except cctool.base.errors.CheckpointError as error:
        print(error)
"""


class CctoolError(Exception):
    """Base of all errors raised on purpose; ends a command with exit status 1."""

    exit_status = 1


class UsageError(CctoolError):
    """Options contradict each other or lie outside their range; ends a command with exit status 2."""

    exit_status = 2


class CheckpointError(CctoolError):
    """A file cannot be read as a checkpoint, or a checkpoint cannot be written."""


class UnsafeCheckpointError(CheckpointError):
    """Only unpickling could read the file, which would run code that it contains."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated or altered, or its parts contradict each other."""


class SpecError(CheckpointError):
    """The spec in a checkpoint cannot be built, or its tensors do not back the shapes it asks for."""


class ArchitectureError(CctoolError):
    """An architecture is unknown, or does not take the arguments given."""


class DataError(CctoolError):
    """A data set is missing, damaged or unknown."""


class UserCodeError(CctoolError):
    """A function that the user named on the command line failed or returned the wrong thing."""


class TrainingError(CctoolError):
    """Training cannot start or continue."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite."""


class PruningError(CctoolError):
    """Nothing can be cut, or the cut network does not compute what the masked one does."""


class QuantizationError(CctoolError):
    """A tensor or layer cannot be taken by the quantization method asked for."""


class TransformError(CctoolError):
    """A layer or feature map cannot be taken by the transform asked for."""


class BitstreamError(CctoolError):
    """A coded stream is truncated or altered, or claims more than it holds."""


class ExportError(CctoolError):
    """The exported model does not compute what the model does."""


class DeviceError(CctoolError):
    """The device or precision asked for is not available."""
