"""Measure the structure of the package: `make structure` prints it and fails above a limit.

``python tests/structure.py --all`` lists every finding, ``--only words`` one measurement, ``--paths pixart_nb/viz``
those of one folder.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pixart_nb"
MAX_FUNCTION_LINES = 60


@dataclass
class Measurement:
    """One number, its limit, and the places that it counts."""

    name: str
    value: int
    limit: int
    findings: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        """True if the value is within the limit."""
        return self.value <= self.limit


@cache
def modules() -> dict[str, tuple[Path, ast.Module]]:
    """Path and syntax tree of each module of the package, by dotted name."""
    result = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        result[name] = path, ast.parse(path.read_text())
    return result


def nodes_with_path(kinds) -> Iterator[tuple[str, ast.AST]]:
    """Yield (path relative to the project, node) for each node of the given types."""
    for path, tree in modules().values():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield str(path.relative_to(ROOT)), node


def lines(folder: Path, limit: int) -> Measurement:
    """Lines of the Python files of a folder."""
    count = {path: len(path.read_text().splitlines()) for path in folder.rglob("*.py")}
    largest = sorted(count, key=count.get, reverse=True)[:10]
    findings = [f"{path.relative_to(ROOT)}: {count[path]}" for path in largest]
    return Measurement(f"lines of {folder.relative_to(ROOT)}", sum(count.values()), limit, findings)


def _imports(name: str, tree: ast.Module) -> Iterator[tuple[str, int, bool]]:
    """Yield (imported module of the package, line, True inside a function); imports for type checking are left out."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child, inside
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    package = name if modules()[name][0].name == "__init__.py" else name.rpartition(".")[0]
    for node, inside in walk(tree, False):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            targets = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in modules() else base for target in targets]
        else:
            continue
        yield from ((target, node.lineno, inside) for target in targets if target in modules())


def _components(edges: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan 1972)."""
    index, low, stack, components = {}, {}, [], []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(edges[name]):
            if target not in index:
                visit(target)
            if target in stack:
                low[name] = min(low[name], low[target])
        if low[name] == index[name]:
            component = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(component) > 1:
                components.append(sorted(component))

    for name in edges:
        if name not in index:
            visit(name)
    return components


def import_cycles() -> list[Measurement]:
    """Import cycles, and imports inside a function that hide one: with them at the top there would be a cycle."""
    edges = {name: list(_imports(name, tree)) for name, (_, tree) in modules().items()}
    top = {name: {t for t, _, inside in rows if not inside and t != name} for name, rows in edges.items()}
    every = {name: {t for t, _, _ in rows if t != name} for name, rows in edges.items()}
    cycles = [" <-> ".join(component) for component in _components(top)]
    component_of = {name: number for number, c in enumerate(_components(every)) for name in c}
    hidden = [
        f"{modules()[name][0].relative_to(ROOT)}:{line}: imports {target}"
        for name, rows in edges.items()
        for target, line, inside in rows
        if inside and target != name and name in component_of and component_of.get(target) == component_of[name]
    ]
    return [
        Measurement("import cycles", len(cycles), 0, cycles),
        Measurement("imports inside functions that hide a cycle", len(hidden), 0, hidden),
    ]


def layers() -> Measurement:
    """Imports that break the order of the folders: core imports no viz, cli or pixelart; viz imports no MindSpore."""
    findings = []
    for path, node in nodes_with_path((ast.Import, ast.ImportFrom)):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        above = ("pixart_nb.viz", "pixart_nb.cli", "pixart_nb.pixelart")
        wrong = path.startswith("pixart_nb/core") and any(n.startswith(above) for n in names)
        wrong |= path.startswith("pixart_nb/viz") and any(n.startswith("mindspore") for n in names)
        if wrong:
            findings.append(f"{path}:{node.lineno}: imports {', '.join(names)}")
    return Measurement("imports against the order of the folders", len(findings), 0, findings)


def long_functions() -> Measurement:
    """Functions of more than 60 lines."""
    findings = []
    for path, node in nodes_with_path((ast.FunctionDef, ast.AsyncFunctionDef)):
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION_LINES:
            findings.append(f"{path}:{node.lineno}: {node.name}, {length} lines")
    return Measurement(f"functions of more than {MAX_FUNCTION_LINES} lines", len(findings), 0, findings)


def repeated_class_names() -> Measurement:
    """Class names that several classes have."""
    defined: dict[str, list[str]] = {}
    for path, node in nodes_with_path(ast.ClassDef):
        defined.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    findings = [f"{name}: {', '.join(paths)}" for name, paths in defined.items() if len(paths) > 1]
    return Measurement("class names used twice", len(findings), 0, findings)


def guidance_defaults() -> Measurement:
    """Places where 4.5 is written as a value in the package."""
    constants = nodes_with_path(ast.Constant)
    findings = [f"{p}:{n.lineno}" for p, n in constants if type(n.value) is float and n.value == 4.5]
    return Measurement("places that write 4.5", len(findings), 1, findings)


#: Draws one image by the command line; prints the stack of the first attention, then the imported files.
DRAW = """
import sys
from pathlib import Path

package, folder = Path(sys.argv[1]), sys.argv[2]

def profile(frame, event, _):
    path, name = frame.f_code.co_filename, frame.f_code.co_name
    files = "core/models/attention.py", "core/fast/cpu.py"
    if event != "call" or not path.endswith(files) or "attention" not in name:
        return
    frames = []
    while frame is not None:
        if package in Path(frame.f_code.co_filename).parents:
            frames.append(f"{Path(frame.f_code.co_filename).relative_to(package)}: {frame.f_code.co_qualname}")
        frame = frame.f_back
    if any("fast/" in f or "transformer" in f for f in frames):
        sys.setprofile(None)
        print("FRAMES", *reversed(frames), sep="\\n", file=sys.__stdout__)

from pixart_nb.cli import app
sys.setprofile(profile)
try:
    app(["sample", "--prompt", "a red mushroom on grass", "--image-height", "64", "--image-width", "64",
         "--sampling-steps", "1", "--output-path", folder])
except SystemExit as end:
    if end.code:
        raise
files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
print("FILES", *sorted(f for f in files if f and package in Path(f).parents), sep="\\n", file=sys.__stdout__)
"""


def one_image() -> list[Measurement]:
    """Files that `pixart-nb sample` imports, and frames of the package up to the transformer's first attention."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", DRAW, str(PACKAGE), f"{folder}/images"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    parts = re.search(r"FRAMES\n(.*?)^FILES\n(.*)", result.stdout, re.DOTALL | re.MULTILINE)
    if result.returncode or not parts:
        raise RuntimeError(f"drawing an image failed:\n{result.stdout[-2000:]}{result.stderr[-3000:]}")
    frames = [line for line in parts[1].splitlines() if ".py: " in line]
    files = [str(Path(line).relative_to(ROOT)) for line in parts[2].splitlines() if line.endswith(".py")]
    return [
        Measurement("files imported to draw one image", len(files), 50, files),
        Measurement("frames from the command line to the first attention", len(frames), 7, frames),
    ]


#: Words that are replaced everywhere, in prose and in names: pattern, replacement (the left columns of STYLE.md).
WORDS = {
    r"pictures?(?![a-z])": "image",
    r"settle_threads": "pin_threads",
    r"kinds? of numbers?": "dtype",
    r"turned weights|kept turned|weights turned": "transposed weights",
    r"multiply-adds?|multiply_adds?": "MACs",
    r"(?<![a-z])widened": "upcast",
    r"(?<![a-z])standardi[sz]ed?(?![a-z])": "normalize, layer_norm",
    r"guided_prediction": "classifier-free guidance",
    r"goes on where|went on where|go on where": "resumes",
    r"drawn anew|draws? anew|drawing anew": "resample, image-to-image",
    r"(?:is|are|was) to be had": "is available",
    r"have their say|has its say": "hooks",
    r"heads_off": "ablate_heads",
    r"scale_word": "reweight_token",
    r"official_view": "to_official_names",
    r"written_beside": "atomic_write",
    r"(?<![a-z])unfilled": "init_empty",
    r"processor seconds?": "CPU time",
    r"embedded model": "bundled model",
    r"the house(?![a-z])": "layout",
    r"misspelt": "unknown, with the closest valid",
    r"(?:is|are|was|were|be|unless|when) told(?![a-z])": "is given, is specified",
    r"as wanted|it is wanted|are wanted": "requested",
    r"pixart-nb grow": "pixart-nb upscale",
    r"from_staged|run_staged|sample_staged": "resumable stages",
    r"(?<![a-z])peers?'s(?![a-z])|the peer(?![a-z])": "diffusers",
}
#: Names of classes, functions, arguments and variables: exact name, replacement.
NAMES = {
    "attend": "scaled_dot_product_attention",
    "apart": "run_in_subprocess, separately",
    "Stored": "LazyTensor",
    "lies": "storage_dtype",
    "read_as": "astype",
    "Live": "activation memory",
    "Part": "Hook",
    "Probe": "HookPoint",
    "probe": "hook_point",
    "Observer": "HookManager",
    "observer": "hook_manager",
    "seam": "hook point, tile artifact",
    "seams": "hook points, tile artifacts",
    "averaged": "ema_scope",
    "middle_timesteps": "logit_normal",
    "rooms": "state shapes",
    "places": "the name of the thing",
    "place": "the name of the thing",
    "here": "sigma",
    "there": "sigma_next",
    "grow": "upscale",
    "enlarge": "upscale",
    "staged": "resumable stages",
    "ours": "mindspore",
    "peer": "diffusers",
    "turned": "transposed",
    "products": "macs",
    "told": "formatted",
    "found": "the name of the thing",
    "known": "the name of the thing",
    "wanted": "the name of the thing",
    "said": "the name of the thing",
    "given": "the name of the thing",
    "kind": "the name of the thing",
}
#: First words of docstrings and help texts that say nothing.
OPENINGS = r"^(What|Of|How|Where|Whether|The same|Its|In what|With what|From what)\b"
#: Words that a format or a meaning of their own dictates: (file, word).
ALLOWED: set[tuple[str, str]] = {
    ("CHANGELOG.md", "heads_off"),  # names before and after a renaming
    ("CHANGELOG.md", "scale_word"),
    ("CHANGELOG.md", "settle_threads"),
    ("pixart_nb/core/hooks/trace_files.py", "pictures"),  # name of an array in trace files of version 0.1
    ("pixart_nb/pixelart/captions.py", "picture"),  # captions that the bundled model was trained on
    ("data/tiny-sigma/README.md", "picture"),  # a word of them
    ("pixart_nb/core/data/sources.py", "Part"),  # a part of the published data set
    ("pixart_nb/core/io.py", "probe"),  # a file that is written to try a folder
}


def _text_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    endings = (".py", ".md", ".yaml", ".yml", ".toml", ".ipynb", ".html", ".js", ".css", "Makefile")
    folders = (
        "pixart_nb/",
        "notebooks/",
        "configs/",
        "docs/",
        "benchmarks/",
        "data/",
        "README",
        "CHANGELOG",
        "CONTRIB",
    )
    folders += ("Makefile", "pyproject", "environment")
    return [ROOT / name for name in listed.splitlines() if name.startswith(folders) and name.endswith(endings)]


def words() -> list[Measurement]:
    """Words and names of STYLE.md's left columns in the package, the notebooks, README, configurations and helps."""
    return [_prose(), _names(), _openings()]


def _prose() -> Measurement:
    pattern = re.compile("|".join(f"(?P<w{i}>{p})" for i, p in enumerate(WORDS)), re.IGNORECASE)
    replacements = list(WORDS.values())
    findings = []
    for path in _text_files():
        if not path.exists():
            continue
        name = str(path.relative_to(ROOT))
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in pattern.finditer(line):
                if (name, match.group().lower()) not in ALLOWED:
                    better = replacements[int(match.lastgroup[1:])]
                    findings.append(f"{name}:{number}: {match.group()!r}, write {better}")
    return Measurement("words of STYLE.md's left columns", len(findings), 0, findings)


def _names() -> Measurement:
    findings = []
    for path, node in nodes_with_path((ast.Name, ast.arg, ast.FunctionDef, ast.ClassDef, ast.Attribute)):
        if isinstance(node, ast.Name | ast.Attribute) and not isinstance(node.ctx, ast.Store):
            continue
        name = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None) or node.name
        word = name if name in NAMES else name.lstrip("_")
        if word in NAMES and (path, word) not in ALLOWED:
            findings.append(f"{path}:{node.lineno}: {name}, write {NAMES[word]}")
    return Measurement("names of STYLE.md's left columns", len(findings), 0, findings)


def _openings() -> Measurement:
    findings = []
    for path, node in nodes_with_path((ast.Module, ast.ClassDef, ast.FunctionDef, ast.keyword)):
        if isinstance(node, ast.keyword):
            value = node.value
            text = value.value if node.arg in ("help", "description") and isinstance(value, ast.Constant) else None
        else:
            text = ast.get_docstring(node)
        if isinstance(text, str) and re.match(OPENINGS, text):
            line = getattr(node, "lineno", 1)
            findings.append(f"{path}:{line}: {text.splitlines()[0][:80]!r}")
    name = "docstrings and helps that begin with What, Of, How, Where, Whether, The same"
    return Measurement(name, len(findings), 0, findings)


MEASUREMENTS = {
    "lines": lambda: [lines(PACKAGE, 20_000), lines(PACKAGE / "core", 12_000)],
    "cycles": import_cycles,
    "layers": lambda: [layers()],
    "functions": lambda: [long_functions()],
    "classes": lambda: [repeated_class_names()],
    "defaults": lambda: [guidance_defaults()],
    "words": words,
    "image": one_image,
}


def measure(only: str | None = None) -> list[Measurement]:
    """Return the measurements, or those of one name."""
    return list(itertools.chain.from_iterable(f() for name, f in MEASUREMENTS.items() if only in (None, name)))


def main() -> int:
    """Print the measurements; return 1 if one is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="list every finding, not the first twelve")
    parser.add_argument("--only", choices=MEASUREMENTS, help="one measurement")
    parser.add_argument("--paths", nargs="*", default=[""], help="list findings below these paths only")
    options = parser.parse_args()
    measurements = measure(options.only)
    for item in measurements:
        print(f"{'ok ' if item.holds else 'NO '} {item.name}: {item.value} (at most {item.limit})")
        findings = [f for f in item.findings if any(path in f for path in options.paths)]
        show = options.all or options.paths != [""] or not item.holds
        number = len(findings) if options.all or options.paths != [""] else 12
        for finding in findings[:number] if show else []:
            print(f"      {finding}")
        if show and len(findings) > number:
            print(f"      and {len(findings) - number} more (--all lists them)")
    return int(not all(item.holds for item in measurements))


if __name__ == "__main__":
    sys.exit(main())
