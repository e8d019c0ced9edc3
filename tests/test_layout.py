"""Imports between the folders of the package: none runs upwards, and none in a circle."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tensormask"
# From the ground up. `data.checks` is a folder of its own, below `data`.
FLOORS = (
    {"layers", "utils", "config"},
    {"data.checks"},
    {"data", "modeling"},
    {"checkpoint", "evaluation", "visualization"},
    {"engine", "model_zoo"},
    {"predictor", "input_image", "detections", "report", "hub", "export"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
FLOOR_OF = {folder: number for number, floor in enumerate(FLOORS) for folder in floor}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from package import module` imports the module, `from module import name` the name.
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else node.module)
    return found & set(MODULES)


def folder_of(module: str) -> str:
    """The folder of a module, or the module itself at the package's top."""
    parts = module.split(".")[1:]
    return "data.checks" if parts[:2] == ["data", "checks"] else parts[0]


def test_no_import_runs_upwards_and_no_folders_form_a_circle():
    arrows = {
        (folder_of(module), folder_of(target), module, target)
        for module, path in MODULES.items()
        for target in imported_modules(path)
        if "." in module and "." in target
    }
    upwards = [arrow[2:] for arrow in arrows if FLOOR_OF[arrow[0]] < FLOOR_OF[arrow[1]]]
    assert upwards == []
    pairs = {arrow[:2] for arrow in arrows if arrow[0] != arrow[1]}
    assert circle_in(pairs) is None


def test_the_package_imports_nothing_of_dev_tools_or_tests():
    root = PACKAGE.parent
    outside = {p.stem for folder in ("dev", "tools", "tests") for p in (root / folder).iterdir()}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & outside, path


def test_no_modules_form_a_circle():
    arrows = {(m, target) for m, path in MODULES.items() for target in imported_modules(path)}
    # What a package's __init__ offers is imported by its users, not by its own modules. That of
    # tensormask imports its names when they are used.
    assert circle_in({(a, b) for a, b in arrows if a not in (b, "tensormask")}) is None


def circle_in(arrows: set[tuple[str, str]]) -> set[str] | None:
    """The nodes that lie on or lead only into circles; None if there is no circle."""
    left = set(arrows)
    while True:
        sources = {a for a, _ in left}
        inner = {(a, b) for a, b in left if b in sources}
        if inner == left:
            return sources or None
        left = inner


def test_circles_are_found():
    assert circle_in({("a", "b"), ("b", "c")}) is None
    assert circle_in({("a", "b"), ("b", "c"), ("c", "b")}) == {"a", "b", "c"}
