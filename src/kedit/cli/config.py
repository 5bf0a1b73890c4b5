"""``--config FILE``: options of a command from a YAML or JSON file, and the settings of a run written beside its result."""

from __future__ import annotations

import argparse
import datetime
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kedit.errors import ConfigError

MARK = "# Written by kedit"
ACCEPTED = "a YAML or JSON file that maps names of options to their values"
_NOT_SETTINGS = ("help", "config", "force")  # of one call, not of a run


def add_option(parser: argparse.ArgumentParser) -> None:
    """Declare ``--config`` on a command, or on each of its actions."""
    if inner := _actions_of(parser):
        for action in inner.values():
            add_option(action)
        return
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML or JSON file with options of this command; the command line goes before it",
    )


def with_config(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[str], argparse.ArgumentParser | None]:
    """The words of a command line with those of its ``--config`` file before its own, and the parser of its command.

    The words of the file come first, so that argparse lets the command line's prevail; an option that may be repeated is taken
    from the file only where the command line does not give it, but ``--set`` from both.

    Raises:
        ConfigError: the file cannot be read, or names what is no option.
    """
    words = list(argv)
    command, place = parser, 0
    while inner := _actions_of(command):
        at = next((i for i in range(place, len(words)) if words[i] in inner), None)
        if at is None:
            return words, None
        command, place = inner[words[at]], at + 1
    own = words[place:]
    given = {name for word in own for name in _options_named(command, word)}
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--config")
    path = pre.parse_known_args([word for word in own if word != "--"])[0].config
    if path is None:
        return words, command
    others = {name for other in _all_commands(parser) for name in _by_name(other)}
    added: list[str] = []
    for key, value in _read(path).items():
        name = str(key).lstrip("-").replace("_", "-")
        action = _by_name(command).get(name)
        if action is None and name not in others:
            near = difflib.get_close_matches(name, _by_name(command), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: {key} is no option of kedit.{hint} kedit COMMAND --help lists them.")
        repeated = isinstance(action, argparse._AppendAction) and name != "set" and f"--{name}" in given
        if action is not None and value is not None and not repeated:
            added += _words(action, name, value, path)
    return [*words[:place], *added, *own], command


def settings(args: argparse.Namespace, used: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a command as they hold, by name; ``used``: the hyper-parameters of editor and regularizers in the run."""
    values: dict[str, Any] = {}
    for name, action in _by_name(args.parser).items():
        value = getattr(args, action.dest, None)
        if action.dest not in _NOT_SETTINGS and value not in (None, False, []):
            values[name] = value
    if used is not None:
        values.pop("gamma", None)
        values["set"] = dict(used)
    return values


def check_settings_file(path: Path) -> None:
    """Raise ``ConfigError`` where a file stands in the place of the settings that kedit did not write."""
    try:
        taken = path.exists() and not path.read_text(encoding="utf-8").startswith(MARK)
    except (OSError, ValueError):
        taken = True
    if taken:
        raise ConfigError(
            f"{path}, where the settings are to be written, is not a file that kedit wrote. Move it, or choose another --out."
        )


def write_settings(path: Path, args: argparse.Namespace, used: Mapping[str, Any] | None = None) -> Path:
    """Write the settings of a run as a file that ``--config`` takes."""
    import yaml

    from kedit import __version__
    from kedit.utils.files import write_whole

    check_settings_file(path)
    words = " ".join(filter(None, (args.command, getattr(args, "action", None))))
    head = f"{MARK} {__version__}: the settings of `kedit {words}`. Run it again with `kedit {words} --config FILE`.\n"
    text = head + yaml.safe_dump(_plain(settings(args, used)), sort_keys=False, allow_unicode=True, width=1000)

    def write(file: IO[bytes]) -> None:
        file.write(text.encode())

    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)
    return path


def _read(path: str) -> dict[Any, Any]:
    import yaml

    from kedit.utils.texts import read_text

    text = read_text(path, ACCEPTED, ConfigError)
    try:
        content = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is not {'JSON' if path.endswith('.json') else 'YAML'}: {error}. Give {ACCEPTED}."
        ) from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}. Give {ACCEPTED}.")
    return content


def _words(action: argparse.Action, name: str, value: Any, path: str) -> Iterator[str]:
    """An option and its value as words of the command line."""
    option = f"--{name}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{path}: {name} is on or off, true or false, not {value!r}.")
        if value:
            yield option
        return
    if isinstance(value, Mapping):
        if name not in ("set", "guard"):
            raise ConfigError(f"{path}: {name} takes no names with values, found {value!r:.60}.")
        value = [f"{key}={one}" for key, one in _flat(value)]
    several = isinstance(action, argparse._AppendAction) or action.nargs in ("*", "+")
    if isinstance(value, list) and not several:
        raise ConfigError(f"{path}: {name} takes one value, found {len(value)}.")
    texts = [_text(one, name, path) for one in (value if isinstance(value, list) else [value])]
    if action.nargs in ("*", "+"):
        yield from (option, *texts)
    else:
        yield from (f"{option}={text}" for text in texts)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _text(value: Any, name: str, path: str) -> str:
    if isinstance(value, bool):
        raise ConfigError(
            f"{path}: {name} takes a text or number, found {str(value).lower()}. Put quotes around a text like yes or no."
        )
    if not isinstance(value, str | int | float | datetime.date):
        raise ConfigError(f"{path}: {name} takes a text or number, found {value!r:.60}.")
    return str(value)


def _plain(value: Any) -> Any:
    """Values that YAML has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands below a parser by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _all_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    inner = _actions_of(parser)
    if not inner:
        yield parser
    for command in inner.values():
        yield from _all_commands(command)


def _by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command by name, without dashes."""
    return {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.dest not in ("help", "config")
    }


def _options_named(parser: argparse.ArgumentParser, word: str) -> list[str]:
    """The option that a word of the command line is, written out where it is abbreviated."""
    if not word.startswith("--"):
        return []
    given = word.partition("=")[0]
    names = [f"--{name}" for name in _by_name(parser)]
    return [given] if given in names else [name for name in names if name.startswith(given)]
