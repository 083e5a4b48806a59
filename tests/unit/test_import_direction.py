"""Imports go one way: verbs -> folders -> single modules -> errors."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "softprompt_dist"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py")

FOLDERS = {
    "parallel": set(),
    "metrics": set(),
    "data": {"parallel", "metrics"},
    "prompt": {"parallel"},
    "backbone": {"parallel", "data"},
    "lifecycle": {"parallel"},
    "run": {"parallel", "metrics", "data", "prompt", "backbone", "lifecycle"},
    "planning": {"backbone"},
    "adaptation": {"parallel", "data", "backbone", "run", "planning", "lifecycle"},
    "checks": {
        "parallel",
        "data",
        "prompt",
        "backbone",
        "run",
        "planning",
        "adaptation",
        "lifecycle",
    },
    "scheduling": {"data", "backbone", "planning", "adaptation", "checks"},
}
"""Folder -> the other folders it may import."""

SINGLES = {
    "redaction": set(),
    "untrusted": set(),
    "yaml_reading": set(),
    "errors": {"redaction"},
    "launcher": set(),
    "progress": set(),
    "screen": set(),
    "identity": {"errors"},
    "names": {"errors"},
    "private_names": {"errors"},
    "cache": {"errors"},
    "durable": {"errors"},
    "outcome_files": {"errors", "durable"},
    "section": {"errors"},
    "task_config": {"errors", "names", "section"},
    "adapt_config": {"errors", "names", "section"},
    "config": {"errors", "names", "section", "task_config"},
    "recipe": {"errors", "redaction", "section", "untrusted", "yaml_reading"},
    "adapt_stages": {
        "errors",
        "names",
        "section",
        "adapt_config",
        "config",
        "recipe",
        "task_config",
    },
}
"""Single module below the folders -> the single modules it may import; any other is a verb."""

LIGHT = [
    "cli",
    "launcher",
    "errors",
    "cache",
    "config",
    "recipe",
    "durable",
    "doctor",
    "checks/finding",
    "checks/software",
    "checks/job",
    "outcome_files",
    "progress",
    "screen",
    "parallel/stop",
    "parallel/verb",
    "lifecycle/ownership",
    "lifecycle/heartbeat",
    "lifecycle/status",
    "lifecycle/traces",
    "lifecycle/watchdog",
    "status",
    "convert",
    "corpus",
    "plan",
    "slurm",
    "tasks",
    "backbone/architecture",
    "backbone/known_architectures",
    "backbone/cell",
    "backbone/activations",
    "backbone/memory_model",
    *(f"data/catalogue/{path.stem}" for path in (PACKAGE / "data/catalogue").glob("*.py")),
    *(f"planning/{path.stem}" for path in (PACKAGE / "planning").glob("*.py")),
    *(f"scheduling/{path.stem}" for path in (PACKAGE / "scheduling").glob("*.py")),
]
ONLY_AFTER_JOINING = {"backbone/sharding.py"}
"""Subclasses DeepSpeed's; itself imported inside functions only."""
HEAVY = {"torch", "transformers", "deepspeed", "numpy", "datasets"}


def imports(path: Path, *, at_import_only: bool = False) -> Iterator[str]:
    """Full names of the modules that `path` imports, wherever in the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in _top_level(tree) if at_import_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(tree: ast.Module) -> Iterator[ast.AST]:
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)


def part_of(module: str) -> str | None:
    """Folder or single module of ours that `module` belongs to."""
    package, *rest = module.split(".")
    return rest[0] if package == PACKAGE.name and rest else None


def allowed(part: str) -> set[str]:
    if part in SINGLES:
        return SINGLES[part]
    if part in FOLDERS:
        return FOLDERS[part] | SINGLES.keys() - {"launcher"} | {part}
    return FOLDERS.keys() | SINGLES.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    part = path.relative_to(PACKAGE).with_suffix("").parts[0]
    ours = {found for module in imports(path) if (found := part_of(module))}
    assert ours - allowed(part) - {"__version__"} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_deepspeed_is_not_imported_before_join_world(path: Path) -> None:
    top = {module.split(".")[0] for module in imports(path, at_import_only=True)}
    if str(path.relative_to(PACKAGE)) not in ONLY_AFTER_JOINING:
        assert "deepspeed" not in top
    modules = set(imports(path, at_import_only=True))
    assert not modules & {
        f"{PACKAGE.name}.{late.removesuffix('.py').replace('/', '.')}"
        for late in ONLY_AFTER_JOINING
    }


@pytest.mark.parametrize("name", LIGHT)
def test_what_the_command_line_needs_first_is_light(name: str) -> None:
    path = PACKAGE / f"{name}.py"
    assert {m.split(".")[0] for m in imports(path, at_import_only=True)} & HEAVY == set()


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from softprompt_dist.run import loop\nimport deepspeed.comm\n")
    assert {part_of(module) for module in imports(path)} == {"run", None}
    assert "run" not in allowed("data")
    assert list(imports(path, at_import_only=True)) == ["deepspeed.comm"]
