"""What is installed, each distribution read in its own `try`: one with spoilt metadata hides no other.

`importlib.metadata.entry_points` raises for all of them together, and does not say for which.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import Distribution, EntryPoint
from pathlib import PurePath

import attrs

UNKNOWN = "unknown"


@attrs.frozen(kw_only=True)
class Installed:
    """One installed distribution.

    Args:
        name: as its metadata says, else as its directory is called.
        version: as its metadata says, else as its directory is called; "unknown" where neither does.
        points: its entry points in the group that was asked for.
        error: what is wrong with its files, and where they are; empty where nothing is.
    """

    name: str
    version: str
    points: tuple[EntryPoint, ...] = ()
    error: str = ""


def offering(group: str) -> list[Installed]:
    """The distributions with entry points in `group`, and those of which nobody can tell; sorted by name."""
    found = []
    for distribution in _first_of_each_name(importlib.metadata.distributions()):
        points, error = _points(distribution, group)
        if points or error:
            stated = described(distribution)
            error = "; ".join(filter(None, [stated.error, error]))
            found.append(attrs.evolve(stated, points=tuple(points), error=error))
    return sorted(found, key=lambda one: one.name)


def unreadable() -> list[Installed]:
    """The distributions whose entry points cannot be read, at which torch fails, too."""
    read = ((one, _points(one, "")[1]) for one in _first_of_each_name(importlib.metadata.distributions()))
    return [attrs.evolve(described(one), error=error) for one, error in read if error]


def packages(places: Sequence[str]) -> dict[str, str]:
    """The version of every distribution in `places` by its name, sorted; of two with one name the first."""
    found = map(described, importlib.metadata.distributions(path=list(places)))
    versions = {one.name: one.version for one in reversed(list(found))}
    return dict(sorted(versions.items(), key=lambda item: item[0].lower()))


def version(name: str) -> str:
    """The version of a distribution; "unknown" where it is not installed or does not say."""
    found = next(iter(importlib.metadata.distributions(name=name)), None)
    return described(found).version if found else UNKNOWN


def release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, (2, 12) of "2.12.1+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def bringing(name: str, package: str) -> Installed | None:
    """The distribution `name`, if it is installed and the list of its files has some of that package."""
    found = next(iter(importlib.metadata.distributions(name=name)), None)
    try:
        brings = found is not None and any(file.parts[:1] == (package,) for file in found.files or ())
    except Exception:  # a spoilt list of files: nobody can tell
        brings = False
    return described(found) if found and brings else None


def described(distribution: Distribution) -> Installed:
    """Its name and version: read line by line, ten times as fast as all of its metadata."""
    stem_name, _, stem_version = _stem(distribution).partition("-")
    error, text = "", ""
    try:
        # An egg-info may be a file instead of a directory: then it is the metadata itself.
        text = next(filter(None, map(distribution.read_text, ("METADATA", "PKG-INFO", ""))), "")
    except (OSError, UnicodeDecodeError) as caught:
        error = f"its metadata cannot be read: {caught} ({_place(distribution)})"
    lines = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    stated = {key: value.strip() for key, _, value in lines if key in ("Name", "Version")}
    if not error and not stated.get("Name"):
        error = f"its metadata has no name ({_place(distribution)})"
    return Installed(
        name=stated.get("Name") or stem_name or UNKNOWN,
        version=stated.get("Version") or re.sub(r"-py3.*", "", stem_version) or UNKNOWN,
        error=error,
    )


def _points(distribution: Distribution, group: str) -> tuple[list[EntryPoint], str]:
    """The entry points of a group, or what is wrong with the file they stand in."""
    try:
        return [point for point in distribution.entry_points if point.group == group], ""
    except Exception as error:  # what importlib.metadata raises for a spoilt file depends on how it is spoilt
        return [], f"its entry_points.txt cannot be read: {_fault(distribution, error)} ({_place(distribution)})"


def _fault(distribution: Distribution, error: Exception) -> str:
    """The line that is no entry point, which importlib.metadata does not name; else what it says."""
    if not isinstance(error, UnicodeDecodeError):
        for number, line in enumerate((distribution.read_text("entry_points.txt") or "").splitlines(), 1):
            if line.strip() and "=" not in line and not re.match(r"\s*[\[#]", line):
                return f"line {number}, {line.strip()!r}, is not an entry point"
    return f"{type(error).__name__}: {error}"


def _first_of_each_name(found: Iterable[Distribution]) -> Iterator[Distribution]:
    """Of several installations of one distribution the first on `sys.path`, which is the one that is imported."""
    seen = set()
    for distribution in found:
        name = _stem(distribution).partition("-")[0] or described(distribution).name
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name not in seen:
            seen.add(name)
            yield distribution


def _stem(distribution: Distribution) -> str:
    """What the directory of the metadata is called: "name-1.0" of `name-1.0.dist-info`; empty where there is none."""
    path = PurePath(_place(distribution))
    return path.stem if path.suffix in (".dist-info", ".egg-info") else ""


def _place(distribution: Distribution) -> str:
    """Where its metadata is, as far as importlib.metadata tells."""
    return str(getattr(distribution, "_path", "") or distribution.locate_file(""))
