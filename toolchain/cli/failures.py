"""Errors of the machine, which are no bugs: a lack of memory, a path that cannot be used."""

import errno

from laptop.files import reason, shown

OF_FILES = (  # what a path that a user chose may lead to
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR,
    errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EIO,
)  # fmt: skip


def message(error: Exception) -> str | None:
    """The message for a lack of memory or a path that cannot be used; None for other errors."""
    if isinstance(error, OSError) and error.errno in OF_FILES and error.filename:
        path = shown(str(error.filename))
        return f"{path}: {error.strerror}. Check the path and its permissions, or choose another."
    is_lack = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if is_lack or "not enough memory" in str(error) or "can't allocate memory" in str(error):
        return (
            f"memory ran out ({reason(error)}). Take a smaller batch or size, or close other "
            "programs. Then run the same command again: stages that are finished are kept."
        )
    return None
