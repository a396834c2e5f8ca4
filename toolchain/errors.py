"""Errors that a user can cause or repair.

    LaptopError            the message says what was found, what was needed, what to do; exit 1
    ├── BadInput           a value, file or folder that cannot be used
    │   ├── UnknownModel   no such name, folder or reachable Hub id
    │   ├── Unsupported    a class or structure that the method does not cover
    │   └── Infeasible     a budget that no plan can meet
    ├── OutputExists       the output folder holds something that would be lost
    ├── NoSpace            the disk is too full for what is to be written
    ├── DeviceError        a device or host that cannot be reached or does not do what was asked
    ├── MissingExtra       an optional dependency is not installed
    └── CheckFailed        a parity floor or a gate was breached

Anything else that escapes is a bug and keeps its traceback.
"""


class LaptopError(Exception):
    """Base of every error that is reported as a message, not as a traceback."""


class BadInput(LaptopError):
    pass


class UnknownModel(BadInput):
    pass


class Unsupported(BadInput):
    pass


class Infeasible(BadInput):
    pass


class OutputExists(LaptopError):
    pass


class NoSpace(LaptopError):
    pass


class DeviceError(LaptopError):
    pass


class MissingExtra(LaptopError):
    pass


class CheckFailed(LaptopError):
    pass
