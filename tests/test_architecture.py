"""The import rule: data and mathematics know nothing of each other, and only the wiring knows everything."""

import ast
import pathlib
import tomllib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
OURS = ("schemas", "models", "pipeline")
# The modules that join the parts, and the files that they are cut into (`cli_run`). Only they know everything.
WIRING = ("worker", "loop", "monitor", "trainer", "cli", "demo", "meta_training", "backtest")
# A module that imports one of these does input or output, or has a clock.
OUTSIDE = {"aiokafka", "alembic", "faust", "kafka", "mode", "os", "pathlib", "psycopg2", "random", "shutil", "socket"}
OUTSIDE |= {"sqlalchemy", "structlog", "subprocess", "tempfile", "time"}
PURE = {"adaptation", "batching", "binary_copy", "catalogue", "drift", "item_statistics", "support", "synthetic"}
PURE |= {"chunks", "flood_gate", "forgotten", "known", "offline_worker", "outcome", "user_rows"}
PURE |= {"drift_decision", "drift_detector", "drift_expectation", "drift_inputs"}
PURE |= {"event_columns", "inner_rounds"}
PURE |= {"pair_rows", "served_items", "served_pairs", "task_batches"}
PURE |= {"judgement", "rate_limit"}
PURE |= {"foreign_columns", "interaction_log", "protocols"}
KNOWS_MODELS = {"pipeline.registry": "refuses an artefact that must not be served before its row exists"}


def modules() -> dict[str, pathlib.Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: pathlib.Path) -> Iterator[str]:
    """Dotted names that a module imports at run time, inside functions as well."""
    for node in run_time_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            source = ".".join([*package, node.module] if node.module else package)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from run_time_nodes(child)


def imported_modules(name: str) -> set[str]:
    """The modules of ours that a module imports; `from a.b import c` is `a.b.c` where that is a module, else `a.b`."""
    known, found = modules(), set()
    for target in imports(name, known[name]):
        parts = target.split(".")
        names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        if (nearest := next((candidate for candidate in names if candidate in known), None)) and nearest != name:
            found.add(nearest)
    return found


def outside_imports(name: str) -> set[str]:
    return {target.split(".")[0] for target in imports(name, modules()[name])}


def is_wiring(name: str) -> bool:
    """True for the wiring modules and the parts they are cut into, as in `pipeline.cli_run`."""
    own = name.split(".")[-1]
    return name.startswith("pipeline.") and any(own == part or own.startswith(f"{part}_") for part in WIRING)


def pure_modules() -> set[str]:
    return {name for name in modules() if name.startswith("pipeline.") and name.split(".")[-1] in PURE}


@pytest.mark.parametrize("package", ["schemas", "models"])
def test_schemas_and_models_import_nothing_of_ours_nor_each_other(package: str) -> None:
    for name in modules():
        if name.split(".")[0] == package:
            foreign = {target for target in imported_modules(name) if target.split(".")[0] != package}
            assert not foreign, f"{name} imports {foreign}"


def test_only_wiring_imports_wiring() -> None:
    for name in modules():
        if not is_wiring(name):
            wired = {target for target in imported_modules(name) if is_wiring(target)}
            assert not wired, f"{name} imports {wired}"


def test_modules_of_the_pipeline_that_do_input_and_output_do_not_import_models() -> None:
    # What needs both a connection and a tensor's meaning is wiring; a pure module needs no connection.
    for name in modules():
        if name.startswith("pipeline.") and outside_imports(name) & OUTSIDE and not is_wiring(name):
            tensors = {target for target in imported_modules(name) if target.startswith("models.")}
            assert not tensors or name in KNOWS_MODELS, f"{name} imports {tensors}"


def test_pure_modules_touch_nothing_outside() -> None:
    for name in pure_modules():
        assert not outside_imports(name) & OUTSIDE, f"{name} imports {outside_imports(name) & OUTSIDE}"


def test_pure_modules_of_the_pipeline_import_only_pure_ones() -> None:
    for name in pure_modules():
        impure = {target for target in imported_modules(name) if target.startswith("pipeline.")} - pure_modules()
        assert not impure, f"{name} imports {impure}"


def test_models_have_no_clock_no_disk_and_no_logger() -> None:
    forbidden = (OUTSIDE | {"logging", "datetime", "io"}) - {"pathlib"}
    for name in modules():
        if name.startswith("models."):
            assert not outside_imports(name) & forbidden, f"{name} imports {outside_imports(name) & forbidden}"


def test_imports_form_no_cycle() -> None:
    edges = {name: imported_modules(name) for name in modules()}
    while leaves := {name for name, targets in edges.items() if not targets & edges.keys()}:
        edges = {name: targets for name, targets in edges.items() if name not in leaves}
    assert not edges, f"these import each other in a circle, or stand behind one: {sorted(edges)}"


def test_the_distribution_lists_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for package in OURS for path in (ROOT / package).rglob("*") if path.suffix == ".py"}
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} == listed
