"""The shape of the package: imports go down, files stay small, nothing unsafe or heavy comes in.

Read from the source with `ast`, so a breach inside a function counts too. Every failure says in a
sentence what to move.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400

# Each group may import itself and the groups of earlier lines, except for FORBIDDEN below. A name
# is a module or a package of sloth; names on one line may import one another.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("sloth",),  # __init__: names only, resolved on first use
    (
        *("sloth.errors", "sloth.lora_config", "sloth.dtypes", "sloth.machine", "sloth.names"),
        *("sloth.constants", "sloth.quiet", "sloth.redact"),
    ),
    ("sloth.kernels",),
    ("sloth.linear", "sloth.embedding"),
    ("sloth.quant",),
    ("sloth.models",),
    ("sloth.lora", "sloth.formats", "sloth.text"),
    ("sloth.data",),
    ("sloth.infer",),
    ("sloth.train",),
    ("sloth.architecture",),
    ("sloth.assemble",),
    (
        "sloth.exporting",
        "sloth.exporting_gguf",
        "sloth.planning",
        "sloth.new_tokens",
        "sloth.pushing",
    ),
    ("sloth.model", "sloth.estimating"),
    ("sloth.loading",),
    ("sloth.commands",),
    ("sloth.cli",),
)
# Downward by the table, and still not allowed: (importer, imported, why).
FORBIDDEN = (
    ("sloth.models", "sloth.quant", "the projection class is handed in to the decoder"),
    ("sloth.kernels.ops", "sloth.kernels.dispatch", "ops do not know about levels"),
    (
        "sloth.kernels.ops",
        "sloth.kernels.context",
        "what a block hands around is for twins",
    ),
    ("sloth.kernels.ops", "sloth.kernels.llama", "twins call ops, never the other way"),
)

ORACLES = {"transformers", "peft", "trl", "accelerate", "bitsandbytes"}
# An extra that a run asks for by name, imported there and nowhere else.
EXTRAS = {("sloth.train.optim", "bitsandbytes")}
# torch's distributed checkpoints keep their metadata in a pickle.
RUNS_CODE_FROM_FILES = (
    *("pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"),
    "torch.distributed.checkpoint",
)
IMPORTS_BY_NAME = ("import_module", "importorskip", "find_spec")
BUILTINS_THAT_RUN_TEXT = {"eval", "exec", "compile", "__import__"}
UNSAFE_CALLS = {
    *(
        "torch.load",
        "torch.save",
        "torch.jit.load",
        "torch.hub.load",
        "torch.package.PackageImporter",
    ),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"),
}
PICKLING_CALLS = ("_object", "_object_list")
UNSAFE_WHEN = {"shell", "allow_pickle", "trust_remote_code"}
# The names come from a table in the same file, never from data.
IMPORTS_FROM_A_TABLE = {"sloth", "sloth.kernels.dispatch", "sloth.train.trackers"}


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SLOTH = {module_name(path): path for path in python_files("sloth")}


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node except those under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(line, module) of every import at run time, inside functions too."""
    found: list[tuple[int, str]] = []
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the import in full"
            for alias in node.names:
                if (node.module, alias.name) == ("sloth", "__version__"):
                    continue  # a constant of the package; nothing is loaded for it
                full = f"{node.module}.{alias.name}"
                found.append((node.lineno, full if full in SLOTH else node.module or ""))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(IMPORTS_BY_NAME):
            if node.args and isinstance(node.args[0], ast.Constant):
                found.append((node.lineno, str(node.args[0].value)))
    return found


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer_of(module: str) -> int | None:
    for index, names in reversed(list(enumerate(LAYERS))):
        if any(is_within(module, name) for name in names if name != "sloth"):
            return index
    return 0 if module == "sloth" else None


def layer_breaches(module: str, imported: str) -> str | None:
    """A sentence about what is wrong with `module` importing `imported`, or None."""
    if not is_within(imported, "sloth") or module == "sloth" or imported == module:
        return None
    if imported == "sloth" and module != "sloth.cli":
        return f"{module} takes a public name from sloth; import the module that defines it"
    own, other = layer_of(module), layer_of(imported)
    for importer, target, why in FORBIDDEN:
        if is_within(module, importer) and is_within(imported, target):
            return f"{module} must not import {imported}: {why}"
    assert own is not None and other is not None
    if other > own:
        return (
            f"{module} imports {imported}, which stands above it; move what it needs down into "
            f"{' or '.join(LAYERS[own])} or below, or hand it in as an argument"
        )
    return None


@pytest.mark.parametrize("module", SLOTH)
def test_every_module_has_a_layer(module: str) -> None:
    assert layer_of(module) is not None, f"{module} is in no layer; add it to LAYERS in {__file__}"


@pytest.mark.parametrize("module", SLOTH)
def test_imports_go_down_only(module: str) -> None:
    for line, imported in imports_of(SLOTH[module]):
        breach = layer_breaches(module, imported)
        assert breach is None, f"{SLOTH[module].relative_to(ROOT)}:{line}: {breach}"


def cycles(imports: Mapping[str, Collection[str]]) -> Iterator[list[str]]:
    """Modules that reach one another, in groups of two or more, and those that import themselves.

    Groups are the strongly connected components, by Tarjan's algorithm (1972).
    """
    number: dict[str, int] = {}  # of a module, in the order of the visits
    lowest: dict[str, int] = {}  # number that it reaches among the modules still open
    is_open: list[str] = []

    def visit(module: str) -> Iterator[list[str]]:
        number[module] = lowest[module] = len(number)
        is_open.append(module)
        for other in imports[module]:
            if other not in number:
                yield from visit(other)
            if other in is_open:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == number[module]:
            start = is_open.index(module)
            group, is_open[start:] = is_open[start:], []
            if len(group) > 1 or module in imports[module]:
                yield sorted(group)

    for module in imports:
        if module not in number:
            yield from visit(module)


def test_modules_import_one_another_in_no_circle() -> None:
    imports = {m: {i for _, i in imports_of(path) if i in SLOTH} for m, path in SLOTH.items()}
    for group in cycles(imports):
        pytest.fail(
            f"{', '.join(group)} import one another in a circle; move what they share into a "
            "module of its own, or hand it in as an argument"
        )


def test_the_rule_against_circles_finds_each_of_them() -> None:
    imports = {"a": "b", "b": "cx", "c": "ad", "d": "ef", "e": "d", "f": "", "x": "x", "y": "f"}
    assert sorted(cycles(imports)) == [["a", "b", "c"], ["d", "e"], ["x"]]


def test_the_rule_catches_each_kind_of_breach() -> None:
    assert layer_breaches("sloth.models.llama", "sloth.quant.linear4bit")
    assert layer_breaches("sloth.kernels.ops.glu", "sloth.linear")
    assert layer_breaches("sloth.kernels.ops.glu", "sloth.kernels.dispatch")
    assert layer_breaches("sloth.train.trainer", "sloth.model")
    assert layer_breaches("sloth.model", "sloth.cli")
    assert layer_breaches("sloth.kernels.ops.glu", "sloth.kernels.llama")
    assert layer_breaches("sloth.train.trainer", "sloth")
    assert layer_breaches("sloth.cli", "sloth") is None
    assert layer_breaches("sloth.model", "sloth.train.trainer") is None
    assert layer_breaches("sloth.errors", "sloth.errors") is None


@pytest.mark.parametrize(
    "path",
    python_files("sloth", "tests", "tools", "examples", "benchmarks"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_stay_small(path: Path) -> None:
    count = len(path.read_text().splitlines())
    name = path.relative_to(ROOT)
    assert count <= MAX_LINES, f"{name} has {count} lines, over {MAX_LINES}; move a part of it out"


def test_no_module_shares_a_public_functions_name() -> None:
    """Importing a sub-module `sloth.load` would replace the function `sloth.load`."""
    init = ast.parse(SLOTH["sloth"].read_text())
    names = next(
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    for name in set(names) - {"errors"}:
        assert f"sloth.{name}" not in SLOTH, (
            f"sloth/{name}.py would replace the public name sloth.{name} once imported; rename it"
        )


@pytest.mark.parametrize("module", SLOTH)
def test_runtime_never_imports_the_oracles(module: str) -> None:
    for line, imported in imports_of(SLOTH[module]):
        assert imported.split(".")[0] not in ORACLES or (module, imported) in EXTRAS, (
            f"{SLOTH[module].relative_to(ROOT)}:{line} imports {imported}; sloth runs without it, "
            "move the use into a test"
        )


def test_only_oracles_py_imports_the_oracles() -> None:
    for path in python_files("tests", "tools", "examples"):
        if path == ROOT / "tests" / "oracles.py":
            continue
        for line, imported in imports_of(path):
            assert imported.split(".")[0] not in ORACLES, (
                f"{path.relative_to(ROOT)}:{line} imports {imported}; move it into tests/oracles.py"
            )


def full_names(tree: ast.AST) -> dict[str, str]:
    """Local name -> what was imported under it, in full."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname: a.name for a in node.names if a.asname}
    return found


def unsafe_uses(source: str, module: str = "") -> Iterator[str]:
    """What in the source could run what a file says, in sentences that begin with the line."""
    tree = ast.parse(source)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for full in [a.name for a in node.names] + [getattr(node, "module", None) or ""]:
                if full.startswith(RUNS_CODE_FROM_FILES):
                    yield f"{node.lineno} imports {full}, which runs code from files"
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        called = names.get(first, first) + dot + rest
        if called in BUILTINS_THAT_RUN_TEXT or called.removeprefix("builtins.") in (
            BUILTINS_THAT_RUN_TEXT
        ):
            yield f"{node.lineno} calls {called}; write the code out instead"
        if called in UNSAFE_CALLS or called.endswith(PICKLING_CALLS):
            yield f"{node.lineno} calls {called}; use safetensors, JSON, safe_load, a list of argv"
        if called == "importlib.import_module" and module not in IMPORTS_FROM_A_TABLE:
            if not node.args or not isinstance(node.args[0], ast.Constant):
                yield f"{node.lineno} imports a module by a name that is not written there"
        for keyword in node.keywords:
            if keyword.arg in UNSAFE_WHEN and ast.unparse(keyword.value) != "False":
                yield f"{node.lineno} gives {keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("module", SLOTH)
def test_nothing_runs_code_from_files(module: str) -> None:
    path = SLOTH[module]
    found = list(unsafe_uses(path.read_text(), module))
    assert not found, f"{path.relative_to(ROOT)}:{'; '.join(found)}"


@pytest.mark.parametrize(
    "line",
    [
        *("import pickle", "from pickle import loads", "import dill as d", "import runpy"),
        *("import torch.distributed.checkpoint", "from shelve import open"),
        *("eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "builtins.eval(x)"),
        *("torch.load(x)", "from torch import load as l\nl(x)", "import torch as t\nt.save(x, y)"),
        *("torch.jit.load(x)", "os.system(x)", "from os import popen\npopen(x)"),
        *("subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=flag)"),
        *("subprocess.getoutput(x)", "yaml.load(x)", "yaml.unsafe_load(x)"),
        *("np.load(x, allow_pickle=True)", "dist.broadcast_object_list(x)"),
        *("dist.all_gather_object(x, y)", "importlib.import_module(config['class'])"),
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_rule_against_running_files_catches_each_way(line: str) -> None:
    assert list(unsafe_uses(line)), line


def test_the_rule_against_running_files_lets_ordinary_code_pass() -> None:
    ordinary = "re.compile(x); model.eval(); yaml.safe_load(x); subprocess.run([x], shell=False)"
    assert not list(unsafe_uses(f"{ordinary}; importlib.import_module('triton'); json.load(x)"))


@pytest.mark.parametrize("module", sorted(set(SLOTH) - {"sloth.text.chat"}))
def test_templates_are_rendered_in_one_place(module: str) -> None:
    for line, imported in imports_of(SLOTH[module]):
        assert imported.split(".")[0] != "jinja2", (
            f"{SLOTH[module].relative_to(ROOT)}:{line} imports jinja2; templates come unchecked, "
            "so render them with sloth.text.chat, which holds the only sandbox"
        )
