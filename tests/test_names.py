"""Names that a file gives become paths only through the functions that check them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMING = {  # keys of JSON files whose values name something
    *("file", "file_name", "files", "path", "name", "shards", "chunks", "folder", "image"),
    *("images", "component", "target", "label", "run", "model", "source", "weight_map"),
}
CHECKED = {  # where such a value becomes a path, and what has checked it before
    "artifacts / artifact.file": "Artifacts.read",
    "self.artifacts / artifact.file": "Artifacts.read",
    "folder / artifact.file": "Artifacts.read",
    "out / artifact.component": "Artifacts.read: a name of COMPONENTS",
    "self.folder / artifact.folder": "Artifacts.read",
    "self.folder / unet.folder": "Artifacts.read",
    "self.artifacts / unet.folder": "Artifacts.read",
    "out / r.folder": "a target of `--to`, by TARGETS",
    "folder / request.folder": "a target of `--to`, by TARGETS",
    "scratch / request.folder": "a target of `--to`, by TARGETS",
    "folder / request.file(component)": "a target of `--to`, by TARGETS",
    "folder / TARGETS[request.target].file.format(component=component)": "a target, by TARGETS",
    "locating.folder(job.model) / folder_of(job.component)": "names of COMPONENTS",
    "source / ('vae' if self.component.startswith('vae_') else self.component)": "likewise",
    "Path(self.file)": "a setting: a user's own file",
    "Path(self.path)": "a path of this program",
    "Path(self.source)": "the source of a workload, which `timed_components` found",
    "Path(workload.source)": "the source of a workload, which `timed_components` found",
    "Path(part.source)": "the source of a component, which `timed_components` found",
    "Path(config.source)": "a setting: a user's own data",
    "Path(recipe.data.source)": "a setting: a user's own data",
    "Path(model.source)": "a model by its known name",
    "Path(result.model)": "a developer's program, on its own report",
    "out / chart.name": "a figure that a study names",
    "Path(teacher.path if teacher else '')": "only the size of its weights is shown",
}


def names_a_path(node: ast.AST) -> bool:
    """Whether an expression is a path that is made from a value of a JSON file."""
    match node:
        case ast.BinOp(op=ast.Div(), right=right):
            parts = [right]
        case ast.Call(func=ast.Name(id="Path" | "open"), args=parts):
            pass
        case ast.Call(func=ast.Attribute(attr="with_name" | "joinpath"), args=parts):
            pass
        case _:
            return False
    return any(key(inner) in NAMING for part in parts for inner in ast.walk(part))


def key(node: ast.AST) -> object:
    match node:
        case ast.Subscript(slice=ast.Constant(value=value)):
            return value if isinstance(value, str) else None
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=value), *_]):
            return value if isinstance(value, str) else None
        case ast.Attribute(attr=name) if name != "name":  # that is a path's own name
            return name
    return None


def test_a_name_from_a_file_becomes_a_path_through_the_function_that_checks_it() -> None:
    """What is new here goes through `files.inside`, or stands in CHECKED with the reason."""
    expressions = {
        ast.unparse(node)
        for folder in ("toolchain", "pruning", "distill", "export", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if names_a_path(node)
    }
    assert expressions <= CHECKED.keys()
