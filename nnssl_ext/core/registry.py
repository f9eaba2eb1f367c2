"""Registries of named classes that are found by importing the modules of one package."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from typing import Generic, TypeVar

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by name. The package that defines them is imported when a name is first asked for.

    Args:
        kind: What the classes are, for messages ("trainer").
        package: Dotted name of the package whose modules register classes.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._classes: dict[str, T] = {}
        self._discovered = False

    def register(self, cls: T) -> T:
        """Class decorator that adds a class under its own name.

        Raises:
            ValueError: If another class has that name.
        """
        known = self._classes.setdefault(cls.__name__, cls)
        if known is not cls and known.__module__ != cls.__module__:
            raise ValueError(f"two {self.kind}s are called {cls.__name__}: in {known.__module__} and {cls.__module__}")
        self._classes[cls.__name__] = cls
        return cls

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, prefix=f"{self.package}."):
            importlib.import_module(module.name)
        self._discovered = True

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._classes)

    def get(self, name: str) -> T:
        """The class of that name.

        Raises:
            ValueError: If there is none; the message names the nearest and all valid names.
        """
        self._discover()
        if name in self._classes:
            return self._classes[name]
        folded = {known.lower(): known for known in self._classes}
        asked = name.lower()
        whole = [key for key in (asked, asked + self.kind) if key in folded]
        near = whole or difflib.get_close_matches(asked, folded, n=1)
        hint = f" Did you mean {folded[near[0]]}?" if near else ""
        raise ValueError(f"there is no {self.kind} called {name!r}.{hint} Valid: {', '.join(sorted(self._classes))}")
