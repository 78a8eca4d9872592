"""The rooms of docs/design.md: imports point one way."""

import ast

from conftest import REPO

LEAVES = {"errors", "files", "space", "processes", "report"}
BELOW = {  # room -> what it may import besides leaves; each row stands on the rows above it
    "encoders": set(),
    "engine": {"encoders"},
    "data": set(),
    "evaluation": {"data"},
    "landmarks": {"engine", "data", "evaluation"},
    "transfer": {"encoders", "landmarks"},
    "methods": {"encoders", "engine", "data", "evaluation", "landmarks", "transfer"},
    "bundles": {"encoders", "engine", "data", "evaluation", "landmarks", "transfer", "methods"},
    "study": {"encoders", "engine", "data", "evaluation", "landmarks", "transfer", "methods", "bundles"},
    "cli": {
        "encoders",
        "engine",
        "data",
        "evaluation",
        "landmarks",
        "transfer",
        "methods",
        "bundles",
        "study",
    },
}


def imports():
    """Module -> modules of this package it imports, wherever in the file."""
    found = {}
    for path in (REPO / "custom").rglob("*.py"):
        name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        targets = set()
        for node in nodes:
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                whole = node.module == "custom"  # `from custom import x` is the module custom.x
                names = {f"custom.{a.name}" for a in node.names if not a.name.startswith("_")}
                beside = f"{name.rpartition('.')[0]}." if node.level else ""
                targets |= names if whole else {f"{beside}{node.module}"}
        found[name] = {target for target in targets if target.split(".")[0] == "custom"}
    return found


def room(module):
    return module.split(".")[1] if "." in module else ""


def test_rooms_import_only_what_the_design_allows():
    for module, targets in imports().items():
        mine = room(module)
        if mine:
            allowed = BELOW.get(mine, set()) | LEAVES | {mine, ""}
            strangers = {t for t in targets if room(t) not in allowed}
            assert not strangers, f"{module} imports {sorted(strangers)}"


def test_every_room_is_on_the_map():
    assert {room(module) for module in imports()} - {""} == set(BELOW) | LEAVES


def test_no_module_imports_itself_through_others():
    graph = imports()

    def visit(module, path):
        assert module not in path, " -> ".join([*path, module])
        for target in graph.get(module, ()):
            visit(target, [*path, module])

    for module in graph:
        visit(module, [])
