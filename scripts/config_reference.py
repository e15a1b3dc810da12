"""Write docs/config.md: every key with type, default and meaning, every group with its options.

Keys, types and defaults come from the pydantic schema, meanings from the docstrings behind its
attributes, options from the files and header comments of conf/ and sweeps/.
Run: python scripts/config_reference.py
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from golden_configs import resolved
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mediphi.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "config.md"

HEAD = """# Config reference

Written by `scripts/config_reference.py` from the schema (`schema.py`, `stages.py`, `corpus.py` in
`src/mediphi/config/`) and from the files under `conf/` and `sweeps/`. Do not edit it.

Hydra composes the groups, the schema judges the result. Any key can be given as `key=value`; a key
that the schema does not know is refused with the nearest known one. `python train.py --cfg job`
prints the composed values.

*Default* is the schema's; **required** means that a group file must say it. *Default run* is what
`python train.py` resolves to, where that differs.
"""

BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


class Section(NamedTuple):
    """A schema class at a place in the config; `kind` tells the members of a union apart."""

    prefix: str
    model: type[BaseModel]
    kind: str | None


def sections(
    model: type[BaseModel], prefix: str = "", kind: str | None = None
) -> Iterator[Section]:
    """Every section below `model`, itself first, in the schema's order."""
    yield Section(prefix, model, kind)
    for name, field in model.model_fields.items():
        inner = list(_models(field.annotation))
        place = f"{prefix}{name}.{'<name>.' if get_origin(field.annotation) is dict else ''}"
        for one in inner:
            yield from sections(one, place, _kinds(one) if len(inner) > 1 else None)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _kinds(model: type[BaseModel]) -> str:
    return ", ".join(map(str, get_args(model.model_fields["kind"].annotation)))


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring behind each attribute, of the class and of those that it extends."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        body = ast.parse(inspect.getsource(owner)).body[0].body  # type: ignore[attr-defined]
        for statement, text in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[statement.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return found


def type_text(schema: dict[str, Any], known: dict[str, Any]) -> str:
    """A JSON schema in words: `cosine | linear`, `number > 0`, `list of text`, `null`."""
    if "$ref" in schema:
        schema = known[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema or "oneOf" in schema:
        options = schema.get("anyOf") or schema["oneOf"]
        return " or ".join(dict.fromkeys(type_text(one, known) for one in options))
    if "enum" in schema or "const" in schema:
        return " \\| ".join(f"`{v}`" for v in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "object")
    if kind == "array":
        return f"list of {type_text(schema['items'], known)}"
    if kind == "object":
        return "section" if "properties" in schema else "sections by name"
    if pattern := schema.get("pattern"):
        return f"text like `{pattern}`"
    limits = " and ".join(
        f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema
    )
    return f"{'text' if kind == 'string' else kind} {limits}".strip()


def table(section: Section, run: Any) -> Iterator[str]:
    """Markdown rows of one section's own keys."""
    schema = section.model.model_json_schema()
    told = meanings(section.model)
    yield "| key | type | default | default run | meaning |"
    yield "|---|---|---|---|---|"
    for name, field in section.model.model_fields.items():
        own = schema["properties"][name]
        text = type_text(own, schema.get("$defs", {}))
        default = "**required**" if field.is_required() else shown(field.get_default())
        here = run.get(name, PydanticUndefined) if isinstance(run, dict) else PydanticUndefined
        value = "" if here is PydanticUndefined or "section" in text else shown(here)
        value = "" if value == default else value
        meaning = " ".join(told.get(name, "").split())
        yield f"| `{section.prefix}{name}` | {text} | {default} | {value} | {meaning} |"


def shown(value: Any) -> str:
    """A value as one writes it on the command line."""
    if isinstance(value, BaseModel):
        return "section"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def _at(run: Any, section: Section) -> Any:
    """The part of a resolved run that a section describes, or None where it is another kind's."""
    for key in section.prefix.split(".")[:-1]:
        run = run.get(key) if isinstance(run, dict) else None
    if section.kind and isinstance(run, dict) and run.get("kind") not in section.kind.split(", "):
        return None
    return run


def header(path: Path) -> str:
    """The comment that a YAML file begins with, on one line."""
    lines: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(" ".join(line.lstrip("# ").split()))
    return " ".join(lines).replace("|", "\\|")


def options() -> Iterator[str]:
    """A table for each config group, then the sweeps."""
    folders = sorted({p.parent for p in (ROOT / "conf").rglob("*.yaml")})
    folders = [f for f in folders if f.name not in ("conf", "help")]
    for folder in [*folders, ROOT / "sweeps"]:
        place = folder.relative_to(ROOT).as_posix()
        group = place.removeprefix("conf/")
        say = {
            "published": "taken unasked for the stage and model of that name",
            "sweeps": "`--config-dir sweeps --config-name <option>`",
        }.get(group, f"`{group.split('/')[0]}={'paper/' if 'paper' in group else ''}<option>`")
        yield f"\n### {place}: {say}\n\n| option | what it is |\n|---|---|"
        yield from (f"| `{p.stem}` | {header(p)} |" for p in sorted(folder.glob("*.yaml")))


def reference() -> str:
    """The whole document."""
    runs = [yaml.safe_load(resolved([f"stage={kind}"])) for kind in ("pit", "dapt")]
    lines = [HEAD, "## Keys"]
    for section in dict.fromkeys(sections(Config)):  # optimizer, quiz and licence stand once
        parts = [_at(run, section) for run in runs]
        title = f"`{section.prefix.rstrip('.')}`" if section.prefix else "Top level"
        title = f"{title}, kind {section.kind}" if section.kind else title
        text = inspect.getdoc(section.model) or ""
        lines += [f"\n### {title}\n\n{text}\n", *table(section, parts[0] or parts[1])]
    lines += ["\n## Groups and options", *options()]
    return "\n".join(lines) + "\n"


def main() -> None:
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(reference(), encoding="utf-8")
    print(f"{TARGET.relative_to(ROOT)} written", file=sys.stderr)


if __name__ == "__main__":
    main()
