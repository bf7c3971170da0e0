"""Symbolic links in a local store: followed only as long as they do not leave its folder.

A store may come from a stranger, with a shard or a record that is a link to any file of the
reader. The folder of the store may itself be one: on clusters it often is.
"""

import errno
import os

from actstore.manifest import FormatError

_IS_LINK = (errno.ELOOP, errno.EMLINK)
"""What opening a link with O_NOFOLLOW gives, on Linux and on BSD."""


class Links:
    """Opens objects below a root, which is not left.

    A file that is a link costs a look where it leads; one that is not costs nothing, the open
    itself tells. Folders are looked at once.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._known: set[str] = set()

    def check_folder(self, path: str) -> None:
        """Refuse the folder of an object that lies elsewhere; FormatError says where it leads."""
        folder = path.rpartition("/")[0]
        if folder not in self._known:
            self.resolve(folder)
            self._known.add(folder)

    def open(self, path: str) -> int:
        """Return a descriptor to read an object by.

        Raises
        ------
        FormatError
            When the object, or a folder on the way, is a link that leaves the root.
        OSError
            As `os.open`.
        """
        self.check_folder(path)
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            return os.open(os.path.join(self._root, path), flags | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno not in _IS_LINK:
                raise
        return os.open(self.resolve(path), flags)

    def resolve(self, path: str) -> str:
        """Return where a path leads after all links; FormatError when that is not in the root."""
        full = os.path.join(self._root, path)
        inside, target = os.path.realpath(self._root), os.path.realpath(full)
        if os.path.commonpath([inside, target]) != inside:
            raise FormatError(
                f"{full.rstrip('/')} is or lies behind a link that leaves the store, to {target}: "
                "nothing outside of a store's folder is read or written. If the link is yours, "
                f"copy the store with what its links lead to (`cp -rL {self._root} COPY`); if not, "
                f"remove the link, and `actstore repair {self._root}` harvests what it stood for"
            )
        return target
