"""From preset names and dotted overrides to one validated `Config`, and back to YAML.

A preset is a YAML file with some of the settings. Presets merge from left to right on top of `base`, overrides win,
and the whole is validated once. A preset may begin with `include: [other, presets]`, which are merged before it.
"""

import difflib
import itertools
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from aceray.config import Config
from aceray.errors import ConfigError
from aceray.secrets import masked

Mapping = dict[str, Any]
OVERRIDE = re.compile(r"^([A-Za-z_][\w.]*)=(.*)$", re.DOTALL)
MOST_ERRORS = 3
MOST_VALUES, MOST_LEVELS, MOST_SHOWN = 100_000, 50, 200
STUDIES = "study/"


def load_config(*arguments: str) -> Config:
    """Merge presets and overrides on top of `base` and validate the result.

    Each argument is a preset (`demo`, `data/spliceosome_32`, a path to a YAML file) or an override (`pip.weight=0.07`).
    Presets are looked for in ./conf, then among those shipped with aceray. An override's value is YAML: `null` and `0`
    override, `1e-3` is a number. `presets` names those given; a saved config.yaml stands for the ones it came from.
    Raises ConfigError: one line with the key, what was found and what is known.
    """
    overrides: Mapping = {}
    names = ["base"]
    for argument in arguments:
        if match := OVERRIDE.match(argument):
            overrides = merge(overrides, nest(match[1], _parse(match[2], argument)))
        else:
            names.append(argument)
    sources: list[tuple[str, Mapping]] = []
    given: list[Any] = []
    for name in names:
        sources += _fragments(name, ())
        known = sources[-1][1].get("presets", name)
        given += known if isinstance(known, list) else [known]
    sources += [("", {"presets": given}), ("", overrides)]
    merged: Mapping = {}
    for _, mapping in sources:
        merged = merge(merged, mapping)
    try:
        return Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_one_line(error, sources)) from error


def read_preset(name: str) -> Mapping:
    """The settings of one YAML file and of what it includes, not validated.

    Raises:
        ConfigError: there is no such file, or it cannot be read.
    """
    merged: Mapping = {}
    for _, mapping in _fragments(name, ()):
        merged = merge(merged, mapping)
    return merged


def with_overrides(mapping: Mapping, *overrides: str) -> Mapping:
    """The mapping with `key=value`s merged on top of it; a value is YAML."""
    for override in overrides:
        match = OVERRIDE.match(override)
        if match is None:
            raise ConfigError(f"{override}: not an override; write key=value")
        mapping = merge(mapping, nest(match[1], _parse(match[2], override)))
    return mapping


def to_yaml(config: BaseModel) -> str:
    """All settings as YAML, itself a preset: `load_config` of the saved text gives an equal config."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def flat(config: Config) -> dict[str, Any]:
    """All settings by dotted key (`pip.weight`), lists and scalars as values."""
    return dict(_leaves(config.model_dump(mode="json"), ""))


def settings() -> dict[str, str]:
    """Every dotted key that `load_config` knows, with its description."""
    return dict(_described(Config, ""))


def preset_names() -> list[str]:
    """Names of all presets that can be given without a path."""
    return [name for name in _file_names() if not name.startswith(STUDIES)]


def study_names() -> list[str]:
    """Names of all studies that can be given without a path."""
    return [name for name in _file_names() if name.startswith(STUDIES)]


def _file_names() -> list[str]:
    return sorted(
        {
            file.relative_to(folder).with_suffix("").as_posix()
            for folder in _folders()
            for file in folder.rglob("*.yaml")
        }
    )


def merge(below: Mapping, above: Mapping) -> Mapping:
    """Both mappings in one, the upper winning leaf by leaf; a section of another `kind` is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        another_kind = both and "kind" in old and value.get("kind", old["kind"]) != old["kind"]
        merged[key] = merge(old, value) if both and not another_kind else value
    return merged


def nest(dotted: str, value: Any) -> Mapping:
    """{"a": {"b": value}} for "a.b"."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


# ---- files


def _folders() -> list[Path]:
    package = Path(__file__).parent
    shipped = package / "conf"  # in an installed wheel; in a checkout the presets lie beside the package
    return [Path("conf"), shipped if shipped.is_dir() else package.parent / "conf"]


def _find(name: str) -> Path:
    stem = name.removesuffix(".yaml")
    given = [Path(name)] if name.endswith((".yaml", ".yml")) else []
    for candidate in [*given, *(folder / f"{stem}.yaml" for folder in _folders())]:
        if candidate.is_file():
            return candidate
    kind, known = ("study", study_names()) if stem.startswith(STUDIES) else ("preset", preset_names())
    close = difflib.get_close_matches(stem, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
    raise ConfigError(f"{name}: no such {kind} or YAML file; {hint}")


def _fragments(name: str, parents: tuple[str, ...]) -> Iterator[tuple[str, Mapping]]:
    """The presets that `name` includes, then its own settings, each with its file."""
    path = _find(name)
    if str(path) in parents:
        raise ConfigError(f"{path}: includes itself ({' > '.join([*parents, str(path)])}); remove one include")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a readable YAML file in UTF-8") from error
    mapping = {} if (found := _parse(text, str(path))) is None else found
    if not isinstance(mapping, dict) or not all(isinstance(key, str) for key in mapping):
        raise ConfigError(f"{path}: a preset is lines of `setting: value`, but this is a {type(found).__name__}")
    mapping = dict(mapping)
    included = mapping.pop("include", [])
    for other in included if isinstance(included, list) else [included]:
        yield from _fragments(str(other), (*parents, str(path)))
    own: Mapping = {}
    for key, value in mapping.items():
        own = merge(own, nest(key, value))
    yield str(path), own


def _parse(text: str, where: str) -> Any:
    where = masked(where)
    try:
        found = _Loader(text).get_single_data()
        # aliases of aliases: a few lines that would be written out, in a message or a file, as gigabytes
        if next(itertools.islice(_values(found), MOST_VALUES, None), None) is not None:
            raise ConfigError(f"{where}: holds more than {MOST_VALUES:,} values, counting what its aliases repeat")
        return found
    except (RecursionError, ValueError, TypeError, AttributeError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: not valid YAML ({reason})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None or mark.line == 0 else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{where}{line}: not valid YAML ({problem})") from error


def _values(found: Any) -> Iterator[Any]:
    """Every value in lists and mappings, as often as it stands there."""
    waiting = [iter([found])]
    while waiting:
        value = next(waiting[-1], waiting)
        if value is waiting:
            waiting.pop()
            continue
        yield True
        if isinstance(value, dict | list):
            waiting.append(iter(value.values() if isinstance(value, dict) else value))


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars (`1e-3` is a number, `no` is a word), and a key twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}
    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MOST_LEVELS:  # each level more takes the parser longer, until it ends in a RecursionError
            raise yaml.composer.ComposerError(None, None, "it is nested too deeply", None)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would take for a number."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
]:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first)


# ---- settings and errors


def _leaves(mapping: Mapping, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The groups of settings an annotation allows: one, several (a union over `kind`), or none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in _models(part)]


def _described(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str]]:
    for name, field in model.model_fields.items():
        yield prefix + name, field.description or ""
        for group in _models(field.annotation):
            yield from _described(group, f"{prefix}{name}.")


def _dotted(location: tuple[int | str, ...]) -> tuple[str, str]:
    """The dotted key of an error, and the `kind` of its section; pydantic puts the kind into the location."""
    parts: list[str] = []
    kind = ""
    groups: list[type[BaseModel]] = [Config]
    for part in location:
        if isinstance(part, int):
            parts[-1] += f"[{part}]"
            continue
        chosen = [group for group in groups if len(groups) > 1 and group.model_fields["kind"].default == part]
        if chosen:
            groups, kind = chosen, part
            continue
        parts.append(part)
        groups = [m for g in groups if part in g.model_fields for m in _models(g.model_fields[part].annotation)]
    return ".".join(parts), kind


def _one_line(error: ValidationError, sources: list[tuple[str, Mapping]]) -> str:
    problems = [_problem(typing.cast(Mapping, item), sources) for item in error.errors(include_url=False)]
    more = len(problems) - MOST_ERRORS
    return "; ".join(problems[:MOST_ERRORS]) + (f"; and {more} more" if more > 0 else "")


def _problem(item: Mapping, sources: list[tuple[str, Mapping]]) -> str:
    key, kind = _dotted(item["loc"])
    file = next((file for file, mapping in reversed(sources) if _contains(mapping, key)), "")
    at = f" (in {file})" if file else ""
    if item["type"] == "extra_forbidden":
        if kind and key in settings():
            return f"{key}: not a setting of kind {kind}{at}; remove it or choose another kind"
        return f"{key}: unknown setting{at}; {suggestion(key)}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        allowed = item["ctx"].get("expected_tags", "")
        return f"{key}.kind: found {item['ctx'].get('tag')!r}{at}; choose one of {allowed or 'the known kinds'}"
    message = re.sub(r"^(Value error, |Input |String )", "", item["msg"])
    message = message.replace("valid dictionary or object to extract fields from", "group of settings")
    if item["type"] == "value_error":
        return f"{key or 'config'}: {message}{at}"
    meaning = settings().get(key, "")
    found = masked(repr(item["input"]))[:MOST_SHOWN]
    return f"{key}: {message}, found {found}{at}" + (f" ({meaning})" if meaning else "")


def _contains(mapping: Any, dotted: str) -> bool:
    for part in dotted.split("[")[0].split("."):
        if not isinstance(mapping, dict) or part not in mapping:
            return False
        mapping = mapping[part]
    return True


def suggestion(unknown: str) -> str:
    """The nearest known key: by name or by the first words of its description, the same section preferred."""
    section, _, leaf = unknown.rpartition(".")

    def likeness(key: str, description: str) -> float:
        parent, _, name = key.rpartition(".")
        words = " ".join(description.split()[: leaf.count("_") + 1])
        return max(_ratio(leaf, name), _ratio(leaf, words.replace(" ", "_"))) + 0.2 * (parent == section)

    known = settings()
    best = max(known, key=lambda key: likeness(key, known[key]))
    if likeness(best, known[best]) >= 0.75:
        return f"did you mean {best}?"
    siblings = [key for key in known if key.rpartition(".")[0] == section] or [key for key in known if "." not in key]
    return f"known here: {', '.join(siblings)}"


def _ratio(left: str, right: str) -> float:
    return difflib.SequenceMatcher(None, left, right).ratio()
