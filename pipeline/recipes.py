"""Named recipes: hyperparameters as TOML files under the home folder, found by name or by path."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

from schemas.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class RecipeUnknown(ConfigurationError):
    """There is no such recipe, or its file is not one: the message names those that there are, or the entry."""


def recipe_path(home: Path, name: str) -> Path:
    """Where a named recipe is kept. Raises RecipeUnknown for a name that is no file name."""
    if not _NAME.fullmatch(name):
        raise RecipeUnknown(f"{name[:80]!r} is no name for a recipe: letters, digits, . _ and - only")
    return home / "recipes" / f"{name}.toml"


def read_recipe(home: Path, name: str) -> dict[str, float]:
    """Values of a recipe by its name, or of the file at a path that ends in .toml. Raises RecipeUnknown."""
    path = Path(name) if name.endswith(".toml") else recipe_path(home, name)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as missing:
        known = sorted(file.stem for file in (home / "recipes").glob("*.toml"))
        raise RecipeUnknown(
            f"no recipe {name!r} ({', '.join(known) or 'none yet'}); `innerloop search` makes one"
        ) from missing
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as broken:
        raise RecipeUnknown(f"recipe {path}: {broken}") from broken
    return found


def write_recipe(path: Path, values: Mapping[str, float], comments: list[str]) -> None:
    """Write a recipe, what it stands on as comments above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*(f"# {line}" for line in comments), *(f"{name} = {value!r}" for name, value in values.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
