"""Which code a result hangs on, found from imports, and a fingerprint that changes exactly when that code does.
Comments, docstrings and data files are no code; rooms that compute nothing (`report`, `run`) are not followed."""

import ast
import importlib.metadata
import sys
import uuid
from functools import cache
from importlib.util import resolve_name
from pathlib import Path

from lib.core.store import ROOT, fingerprint

NOT_FOLLOWED = ("lib.report", "lib.run")


def code_version(*modules: str, root: Path = ROOT) -> str:
    """Fingerprint of the code of `dependencies` of modules such as `"lib.evaluation.sts"`, of torch and transformers. A
    module from outside `lib` (one's own method) counts; where it has no file, as in a notebook, no two are equal."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    codes = {name: _read(root, name)[0] or uuid.uuid4().hex for name in dependencies(*modules, root=root)}
    return fingerprint([versions, codes])


def dependencies(*modules: str, root: Path = ROOT) -> set[str]:
    """These modules and those of `lib` (in `root`) that they import, directly or not, anywhere: dotted names."""
    found, waiting = set(), set(modules)
    while waiting:
        found.add(name := waiting.pop())
        waiting |= {other for other in _read(root, name)[1] if not other.startswith(NOT_FOLLOWED)} - found
    return found


@cache  # for the life of the process, which runs what it imported first even when a file changes
def _read(root: Path, name: str) -> tuple[str, set[str]]:
    """The fingerprint of a module's own code, empty where it has no file, and the modules of `lib` that it imports."""
    path = _path(root, name) or Path(getattr(sys.modules.get(name), "__file__", None) or "")
    if not path.is_file():
        return "", set()
    tree = ast.parse(path.read_bytes())
    imported = set(_imports(tree, root, name, name if path.name == "__init__.py" else name.rpartition(".")[0]))
    for node in ast.walk(tree):  # take out what is nothing but a constant: docstrings
        if isinstance(getattr(node, "body", None), list):
            node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
    return fingerprint(ast.dump(tree)), imported


def _path(root: Path, name: str) -> Path | None:
    """The file of a module or package of `lib`; None if there is no such module."""
    stem = root.joinpath(*name.split("."))
    files = (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")
    return next((file for file in files if name.split(".")[0] == "lib" and file.is_file()), None)


def _imports(tree: ast.Module, root: Path, name: str, package: str):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _path(root, alias.name))
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            for full in (f"{source}.{alias.name}" for alias in node.names):
                if source == "lib" and not _path(root, full):
                    raise ValueError(f"{name} imports {full}; inside lib, import it from the module that defines it.")
                yield from [found for found in (full, source) if _path(root, found)][:1]
