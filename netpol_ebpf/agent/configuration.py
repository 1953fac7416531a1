# SPDX-License-Identifier: Apache-2.0
"""The configuration file and environment variables of the agent and of netpolctl, derived from the agent's parser.

The parser (`netpol_ebpf.agent.main.build_parser`) declares each option once. The option ``--map-size`` is also the key
``mapSize`` in the file and the variable ``NETPOL_EBPF_MAP_SIZE``. The command line has precedence over the environment,
the environment over the file, the file over the default. A list replaces the whole list of a lower layer.

Invariants: an unknown key, an unknown variable and a value of the wrong type are errors that name the line or the
variable. The file is used only if nobody but root and the user of this process can have written it. This module does
not depend on the meaning of any option.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netpol_ebpf.errors import InvalidInputError, Problem, UsageError, ValidationError
from netpol_ebpf.resources.reader import ProblemReport, Reader, not_one_of, suggestion
from netpol_ebpf.resources.yamltree import read_documents

API_VERSION, KIND = "netpol-ebpf/v1alpha1", "NodeConfiguration"
DEFAULT_FILE = Path("/etc/netpol-ebpf/config.yaml")
NO_FILE = "none"
"""The value of ``--config`` with which no file is read, not even the default one."""
PREFIX = "NETPOL_EBPF_"
CONFIG_VARIABLE = f"{PREFIX}CONFIG"
COMMAND_LINE_ONLY = frozenset({"--help", "--version", "--config", "--once"})
"""Options that only the command line can give, because they describe one command and not the agent of this node."""
SERVICE_VARIABLE = re.compile(r"(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)?)")
"""Matches the rest, after PREFIX, of variables that a kubelet sets in pods for a Service named netpol-ebpf or
netpol-ebpf-NAME. These variables are not options."""
MOST_BYTES = 1 << 20
"""Largest file that is read, in bytes. The number is arbitrary: a thousand times what all options need."""
MOST_LINKS = 40
"""Largest number of symbolic links that are followed on the way to the file: the kernel's MAXSYMLINKS."""
MOST_ATTEMPTS = 10
"""How many times the file is opened if a link on the way to it is replaced meanwhile. The number is arbitrary."""
SWITCHES, LISTS, VALUES = ("_StoreTrueAction", "BooleanOptionalAction"), ("_AppendAction",), ("_StoreAction",)
"""Names of argparse's private classes of options: switches, lists, and options with one value."""
WORDS = {"true": True, "false": False}


@dataclass(frozen=True, slots=True)
class Setting:
    """An option of the agent that can also be given by the configuration file and by the environment."""

    action: argparse.Action

    @property
    def flag(self) -> str:
        """The long name of the option, such as ``--map-size``."""
        return next(one for one in self.action.option_strings if one.startswith("--"))

    @property
    def key(self) -> str:
        """The key in the configuration file, such as ``mapSize``."""
        first, *others = self.flag[2:].split("-")
        return first + "".join(other.capitalize() for other in others)

    @property
    def variable(self) -> str:
        """The name of the environment variable, such as ``NETPOL_EBPF_MAP_SIZE``."""
        return PREFIX + self.flag[2:].replace("-", "_").upper()

    @property
    def is_switch(self) -> bool:
        """Whether the option is boolean: its value is true or false, and not a text or a number."""
        return type(self.action).__name__ in SWITCHES

    @property
    def is_list(self) -> bool:
        """Whether the option may be given several times, so that its value is a list."""
        return type(self.action).__name__ in LISTS

    @property
    def default(self) -> Any:
        """The value if neither command line, environment nor file gives one."""
        default = self.action.default
        if isinstance(default, list):
            return list(default)
        return self.parse(default) if isinstance(default, str) else default

    def parse(self, text: str) -> Any:
        """Parse one value as argparse does. Raises ValueError with a text that says what is wrong."""
        value: Any = text
        kind = self.action.type
        if callable(kind):
            try:
                value = kind(text)
            except argparse.ArgumentTypeError as error:
                raise ValueError(str(error)) from error
            except (TypeError, ValueError) as error:
                raise ValueError(f'"{text}" is not {_kind_name(kind)}') from error
        if self.action.choices is not None and value not in self.action.choices:
            raise ValueError(not_one_of(text, [str(one) for one in self.action.choices]))
        return value


@dataclass(frozen=True, slots=True)
class LayerValue:
    """A value from the file or the environment. ``origin``: the variable, or the key with file and line, as text."""

    value: Any
    origin: str


def settings_of(parser: argparse.ArgumentParser) -> dict[str, Setting]:
    """The settings of the agent's parser, in its order, by the name of the attribute in the parsed arguments."""
    found = {}
    for action in parser._actions:  # noqa: SLF001 - argparse has no public list of options
        flags = [one for one in action.option_strings if one.startswith("--")]
        if not flags or COMMAND_LINE_ONLY.intersection(flags):
            continue
        if type(action).__name__ not in (*SWITCHES, *LISTS, *VALUES) or action.nargs not in (None, 0):
            raise AssertionError(f"{flags[0]} is an option of a kind that the configuration file cannot have")
        found[action.dest] = Setting(action)
    return found


def add_config_option(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--config``."""
    parser.add_argument(
        "--config", metavar="FILE",
        help=f"configuration file; {NO_FILE}: no file (default: the environment variable {CONFIG_VARIABLE}, else {DEFAULT_FILE} "
        "if it exists)",
    )  # fmt: skip


def parse_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, environment: Mapping[str, str] = os.environ
) -> argparse.Namespace:
    """Parse the agent's command line, and complete it from environment, file and defaults.

    Raises as `complete` does.
    """
    settings = settings_of(parser)
    arguments = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(settings)))
    complete(arguments, parser, {dest: one.default for dest, one in settings.items()}, environment)
    return arguments


def complete(
    arguments: argparse.Namespace,
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, Any],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Set each argument in ``defaults`` that the command line left at None.

    Its value comes from the environment, otherwise the file, otherwise ``defaults``. ``parser``: the agent's parser.
    ``arguments.origins`` is set to the origin of each value from environment or file, by option. Raises UsageError if a
    variable is wrong, InvalidInputError if the file is.
    """
    settings = settings_of(parser)
    exclusive = [
        {action.dest for action in group._group_actions}  # noqa: SLF001 - argparse has no public list of them
        for group in parser._mutually_exclusive_groups  # noqa: SLF001 - the same
    ]
    named = environment.get(CONFIG_VARIABLE) if getattr(arguments, "config", None) is None else arguments.config
    layers = [_read_environment(settings, environment), _read_file(settings, named)]
    values = {dest: getattr(arguments, dest, None) for dest in settings}
    origins: dict[str, str] = {}
    for layer in layers:
        _require_compatible(settings, layer, exclusive)
        taken = {dest for group in exclusive if any(values.get(one) for one in group) for dest in group}
        for dest, one in layer.items():
            if values[dest] is None and dest not in taken:
                values[dest] = one.value
                origins[settings[dest].flag] = one.origin
    for dest, default in defaults.items():
        setattr(arguments, dest, default if values[dest] is None else values[dest])
    arguments.origins = origins


def origin_hint(message: str, origins: Mapping[str, str]) -> str:
    """A sentence that says where a value was given: the value of the option with which an error message begins.

    "" if the value is from the command line. ``origins``: as `complete` sets it.
    """
    flag = message.partition(" ")[0].rstrip(":")
    return f"{flag} is set by {origins[flag]}." if flag in origins else ""


def _require_compatible(
    settings: Mapping[str, Setting], layer: Mapping[str, LayerValue], exclusive: Collection[Collection[str]]
) -> None:
    for group in exclusive:
        both = [dest for dest in settings if dest in group and dest in layer and layer[dest].value]
        if len(both) > 1:
            first, second = both[:2]
            raise UsageError(
                f"{settings[first].flag} ({layer[first].origin}) and {settings[second].flag} ({layer[second].origin}) exclude each other"
            )


# --- environment --------------------------------------------------------------------------------------------------------


def _read_environment(settings: Mapping[str, Setting], environment: Mapping[str, str]) -> dict[str, LayerValue]:
    """The values that environment variables give, by the attribute of the parsed arguments. Raises UsageError.

    An empty variable gives no value.
    """
    by_variable = {one.variable: dest for dest, one in settings.items()}
    found = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable == CONFIG_VARIABLE:
            continue
        if variable not in by_variable:
            if SERVICE_VARIABLE.fullmatch(variable[len(PREFIX) :]):
                continue
            near = suggestion(variable[len(PREFIX) :], [one[len(PREFIX) :] for one in by_variable], PREFIX)
            raise UsageError(
                f"the environment variable {variable} is no option{near}",
                hint="docs/configuration.md lists all variables.",
            )
        if not text:
            continue
        dest = by_variable[variable]
        try:
            value = _parse_variable(settings[dest], text)
        except ValueError as error:
            raise UsageError(f"the environment variable {variable}: {error}") from error
        found[dest] = LayerValue(value, f"the environment variable {variable}")
    return found


def _parse_variable(setting: Setting, text: str) -> Any:
    if setting.is_switch:
        if text not in WORDS:
            raise ValueError(not_one_of(text, list(WORDS)))
        return WORDS[text]
    if setting.is_list:
        return [setting.parse(one.strip()) for one in text.split(",")]
    return setting.parse(text)


# --- the file -----------------------------------------------------------------------------------------------------------


def _read_file(settings: Mapping[str, Setting], named: str | None) -> dict[str, LayerValue]:
    """The values that the file gives, by the attribute of the parsed arguments. Raises InvalidInputError.

    ``named``: the path of the file; NO_FILE: no file; None: the default file, which need not exist.
    """
    if named == NO_FILE:
        return {}
    path = Path(named) if named else DEFAULT_FILE
    try:
        text = load_trusted(path).decode("utf-8")
    except FileNotFoundError as error:
        if not named:
            return {}
        raise InvalidInputError(f"the configuration file {path} does not exist") from error
    except OSError as error:
        raise InvalidInputError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"the configuration file {path} is not UTF-8") from error
    return parse_file(settings, text, str(path))


def parse_file(settings: Mapping[str, Setting], text: str, file: str) -> dict[str, LayerValue]:
    """Parse the text of a configuration file; returns its values by the attribute of the parsed arguments.

    ``file``: the file's name for messages. Raises ValidationError with all problems.
    """
    problems: list[Problem] = []
    documents = [*read_documents(text, file, problems)]
    if problems:
        raise ValidationError(problems)
    if len(documents) != 1 or not isinstance(documents[0].value, Mapping):
        raise InvalidInputError(
            f"the configuration file {file} must have one object of kind {KIND}",
            hint=f"apiVersion: {API_VERSION}, kind: {KIND}, then options.",
        )
    (document,) = documents
    report = ProblemReport(document.positions)
    reader = Reader(document.value, (), report)
    reader.enum("apiVersion", [API_VERSION], required=True)
    reader.enum("kind", [KIND], required=True)
    found = {}
    for dest, setting in settings.items():
        value = _read_key(setting, reader)
        if value is not None:
            found[dest] = LayerValue(value, f"{setting.key} in {report.location((setting.key,))}")
    reader.done()
    if report.problems:
        raise ValidationError(report.problems)
    return found


def _read_key(setting: Setting, reader: Reader) -> Any:
    """The value of a setting in the file; None if its key is absent. Wrong values are recorded as problems."""
    key = setting.key
    if setting.is_switch:
        value = reader.boolean(key)
        return value if reader.has(key) else None
    if not reader.has(key):
        reader.ignore(key)
        return None
    if setting.is_list:
        texts = [*reader.indexed_strings(key)]
    elif setting.action.type in (int, float):
        number = reader.number(key)
        texts = [] if number is None else [((key,), str(reader.raw(key)))]
    else:
        text = reader.string(key)
        texts = [] if text is None else [((key,), text)]
    values = []
    for path, text in texts:
        try:
            values.append(setting.parse(text))
        except ValueError as error:  # noqa: PERF203 - all problems are reported at once
            reader.report.error(path, str(error))
    return values if setting.is_list else values[0] if values else None


# --- trust --------------------------------------------------------------------------------------------------------------


def load_trusted(path: Path) -> bytes:
    """Read a file that only root and the user of this process can have written. Raises OSError.

    Symbolic links are followed, so that a mounted ConfigMap can be read. Each directory and link on the way must be
    trusted, too.
    """
    for attempt in range(1, MOST_ATTEMPTS + 1):
        try:
            return _load_checked(path)
        except FileNotFoundError:  # noqa: PERF203 - perhaps a kubelet replaced the link ..data after it was followed
            if attempt == MOST_ATTEMPTS or not path.exists():
                raise
    raise AssertionError("the last attempt raises")


def _load_checked(path: Path) -> bytes:
    found = _follow(path)
    with os.fdopen(os.open(found, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        seen = os.fstat(file.fileno())
        if not stat.S_ISREG(seen.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        _require_trusted(found, seen)
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"it is larger than {MOST_BYTES} bytes", str(path))
    return content


def _follow(path: Path) -> Path:
    """Resolve all symbolic links in a path. Raises OSError for an untrusted directory or link on the way."""
    here = Path("/")
    names = [*reversed(path.absolute().parts[1:])]
    links = 0
    while names:
        _require_trusted(here, here.stat())
        name = names.pop()
        if name == "..":
            here = here.parent
            continue
        seen = (here / name).lstat()
        if not stat.S_ISLNK(seen.st_mode):
            here /= name
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        _require_owner(here / name, seen)
        target = (here / name).readlink()
        if target.is_absolute():
            here = Path("/")
        names += reversed(target.parts[1:] if target.is_absolute() else target.parts)
    return here


def _require_owner(path: Path, seen: os.stat_result) -> None:
    if seen.st_uid not in {0, os.geteuid()}:
        raise OSError(
            errno.EPERM, f"{path} belongs to user {seen.st_uid}, neither to root nor to the user of this process"
        )


def _require_trusted(path: Path, seen: os.stat_result) -> None:
    """Raise OSError if a user other than root and the user of this process can write there.

    In a sticky directory nobody can replace what belongs to another user. On a read-only mount nobody in this mount
    namespace can write: a kubelet makes the directory of a ConfigMap with mode 0777 and mounts it read-only.
    """
    _require_owner(path, seen)
    is_sticky = stat.S_ISDIR(seen.st_mode) and bool(seen.st_mode & stat.S_ISVTX)
    if not seen.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or is_sticky:
        return
    if not os.statvfs(path).f_flag & os.ST_RDONLY:
        raise OSError(
            errno.EPERM, f"{path} can be written by its group or by everybody (mode {stat.S_IMODE(seen.st_mode):o})"
        )


def _kind_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number"}.get(kind, "valid")
