"""A run as a file: options under the names of the command line, read from YAML or JSON and written as YAML."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lisa_kernels.commands.arguments import Recomputation
from lisa_kernels.errors import InputError, unknown_name

RUN_FILE_HELP = (
    "file with the options of finetune under their names here, as seq-len: 512 (YAML or JSON; see --save-config), "
    "or run.json of another run, which repeats it; flags that are given win"
)
SAVE_CONFIG_HELP = "write all options into this YAML file, to be given as RUN_FILE, and stop there"
_NOT_OPTIONS = ("help", "run_file", "save_config")


class CommandParser(argparse.ArgumentParser):
    """A parser of one command, which takes a run file's options where it declares `run_file`.

    alternatives: sets of options of which one that is given displaces the others in the file. skipped: a command whose
    options may be in the file and are not read.
    """

    alternatives: tuple[frozenset[str], ...] = ()
    skipped: CommandParser | None = None

    def options(self) -> list[argparse.Action]:
        """Return what may be in a run file."""
        return [action for action in self._actions if action.dest not in _NOT_OPTIONS]

    def parse_known_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse flags, then fill in what is not given from the run file, then defaults; raises InputError."""
        if not any(action.dest == "run_file" for action in self._actions):
            return super().parse_known_args(args, namespace)
        options = self.options()
        required = [action for action in options if action.required]
        for action in required:
            action.required = False
        try:
            # None marks what is not given.
            blank = argparse.Namespace(**{action.dest: None for action in options})
            given, rest = super().parse_known_args(args, blank)
        finally:
            for action in required:
                action.required = True
        flags = {action.dest for action in options if getattr(given, action.dest) is not None}
        saved, given.taken = ({}, {}) if given.run_file is None else self._read(Path(given.run_file), flags)
        for action in options:
            if action.dest not in flags:
                setattr(given, action.dest, saved.get(action.dest, self.get_default(action.dest)))
        missing = [action.option_strings[0] for action in required if getattr(given, action.dest) is None]
        if missing:
            where = "" if given.run_file is None else f", which {given.run_file} does not hold"
            raise InputError(f"{', '.join(missing)} must be given{where}; see {self.prog} --help.")
        return given, rest

    def _read(self, path: Path, flags: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the options of a run file by destination, without those that flags displace, and what its run took."""
        known = _names(self.options())
        also = {} if self.skipped is None else _names(self.skipped.options())
        path, entries, run = read_run_file(path)
        found: dict[str, Any] = {}
        for key, value in entries.items():
            name = str(key).removeprefix("--").replace("_", "-")
            if name not in known:
                if name in also:
                    continue
                raise unknown_name(f"option in {path}", str(key), known)
            action, convert = known[name]
            if action.dest in found:
                raise InputError(f"{path} gives {name!r} twice, or under two names; give it once.")
            if value is not None:
                found[action.dest] = convert(f"{path}: {key}", value)
        displaced = {dest for group in self.alternatives if group & flags for dest in group}
        options = {dest: value for dest, value in found.items() if dest not in displaced}
        return options, _taken(path, run, flags, known)


def _taken(path: Path, run: dict[str, Any], flags: set[str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the run took where nothing was given, but for what follows from an option that `flags` change."""
    if not run:
        return {}
    from lisa_kernels.train.defaults import FOLLOWS
    from lisa_kernels.train.taken import recorded_in

    found = {}
    for dest, value in recorded_in(run).items():
        name = dest.replace("_", "-")
        if value is not None and name in known and not flags.intersection(FOLLOWS[dest]):
            found[dest] = known[name][1](f"{path}: taken: {dest}", value)
    return found


def read_run_file(path: Path) -> tuple[Path, dict[Any, Any], dict[str, Any]]:
    """Return (the file, its options as they are written, the whole of a run.json); a folder is read as its run.json.

    The whole is empty where the file is another. The run's own folder is its output. Raises InputError.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"run file {str(path)!r} cannot be read ({error}); give a YAML file, or run.json.") from error
    entries = _parse_json(file, text) if file.suffix == ".json" else _parse_yaml(file, text)
    if not isinstance(entries, Mapping):
        raise InputError(
            f"run file {str(file)!r} holds {_said(entries)}; a mapping of options to values is wanted, a line each, "
            "such as seq-len: 512."
        )
    if file.name == "run.json" and isinstance(entries.get("options"), Mapping):
        return file, {"output": str(file.parent), **entries["options"]}, dict(entries)
    return file, dict(entries), {}


def _parse_json(file: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"run file {str(file)!r} is no JSON ({error}); mend it, or give a YAML file.") from error


def _parse_yaml(file: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            f"run file {str(file)!r} needs the package pyyaml: pip install 'lisa_kernels[train]', or give JSON."
        ) from error

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise InputError(f"{file} gives {key!r} twice; give it once.")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"run file {str(file)!r} is no YAML ({reason}); write options as name: value, a line each."
        ) from error


def _names(options: Iterable[argparse.Action]) -> dict[str, tuple[argparse.Action, Callable[[str, Any], Any]]]:
    """Return (option, how its value is read) under every name that it has in a file: its flags and what it sets."""
    found: dict[str, tuple[argparse.Action, Callable[[str, Any], Any]]] = {}
    for action in options:
        negated = [flag for flag in action.option_strings if flag.startswith("--no-")]
        for flag in action.option_strings:
            if isinstance(action, Recomputation):
                convert = _negation if flag in negated else _switch_or(_values(action))
            elif action.nargs != 0:
                convert = _values(action)
            else:
                convert = _negation if flag in negated else _switch
            found[flag.removeprefix("--")] = action, convert
        if negated and not isinstance(action, Recomputation):
            found[action.dest.replace("_", "-")] = action, _switch
    return found


def _switch(where: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{where} is {_said(value)}; true or false is wanted.")
    return value


def _switch_or(read: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda where, value: value if isinstance(value, bool) else read(where, value)


def _negation(where: str, value: Any) -> bool:
    return not _switch(where, value)


def _values(action: argparse.Action) -> Callable[[str, Any], Any]:
    """Return what reads the value of an option that has one, or a list where the option may be repeated."""
    convert = action.type if callable(action.type) else str
    kinds: dict[Any, str] = {int: "a whole number", float: "a number"}
    wanted = getattr(convert, "wanted", None) or kinds.get(convert, "text")

    def one(where: str, value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            quoted = "; text such as no, off or yes needs quotes" if isinstance(value, bool) else ""
            raise InputError(f"{where} is {_said(value)}; {wanted} is wanted{quoted}.")
        try:
            # By way of text, as on the command line: YAML reads 1e-4 as text, and 16 as a number.
            return convert(str(value))
        except (TypeError, ValueError) as error:
            raise InputError(f"{where} is {_said(value)}; {wanted} is wanted.") from error

    def several(where: str, value: Any) -> Any:
        return [one(where, item) for item in (value if isinstance(value, list) else [value])]

    # As argparse declares action="append".
    return several if isinstance(action, argparse._AppendAction) else one


def _said(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else repr(value)


def write_run_file(path: Path, parser: CommandParser, arguments: argparse.Namespace) -> None:
    """Write every option with its help as a comment; those that are left to the program are commented out.

    Raises InputError where the file is there already or cannot be written.
    """
    if path.exists() and path.read_bytes():
        raise InputError(f"--save-config {path} is there already; give another name, or delete it.")
    lines = [f"# Options of {parser.prog}; flags that are given win."]
    for action in parser.options():
        value = getattr(arguments, action.dest)
        names = [flag.removeprefix("--") for flag in action.option_strings]
        name = action.dest.replace("_", "-") if names[0].startswith("no-") else names[0]
        lines.append(f"\n# {(action.help or '').replace('%%', '%')}")
        lines.append(f"# {name}:" if value is None else f"{name}: {_written(value)}")
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--save-config {path} cannot be written ({error.strerror}); give another name.") from error


def _written(value: Any) -> str:
    """Return a value as JSON, which YAML reads alike; an exponent has the point that YAML wants."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    if isinstance(value, float) and "." not in (shown := repr(value)):
        return shown.replace("e", ".0e")
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
