"""No shared code asks which family it serves: what differs is written in the family's own files.

Read from the syntax trees of the package. A family's own files are its model file and its twin;
tables that map a model type to something (`ARCHITECTURES`, `TWINS`, the rows of GGUF files) look
it up and compare nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from sloth.formats.wrapper import WRAPPERS
from sloth.models import ARCHITECTURES
from tests.test_layout import ROOT, SLOTH, imports_of

MODEL_TYPES = {*ARCHITECTURES, *WRAPPERS}
FAMILIES = {decoder.__module__.rsplit(".", 1)[1] for _, decoder in ARCHITECTURES.values()}
OWN_FILES = {f"sloth.{place}.{family}" for place in ("models", "kernels") for family in FAMILIES}
CLASSES = {kind.__name__ for pair in ARCHITECTURES.values() for kind in pair}
SHARED = sorted(set(SLOTH) - OWN_FILES)

# Where "llama" and "qwen2" are words of a file format: kinds of tokenizer, not of model.
NAME_TOKENIZERS = {"sloth.formats.gguf_tokenizer", "sloth.formats.gguf_vocabulary"}
SAYS_WHICH = ("model_type", "family", "architectures", "architecture")
ASKING_METHODS = ("startswith", "endswith", "removeprefix", "find")


def texts_in(node: ast.AST) -> set[str]:
    """String constants of an expression, but not the keys it subscripts with."""
    if isinstance(node, ast.Subscript | ast.Call):
        return set()
    if isinstance(node, ast.Constant):
        return {node.value} if isinstance(node.value, str) else set()
    return {text for child in ast.iter_child_nodes(node) for text in texts_in(child)}


def says_which(node: ast.AST) -> bool:
    """Whether an expression is a model type: `model_type`, `x.model_type`, `x["model_type"]`."""
    parts = [part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)]
    names = {part.id if isinstance(part, ast.Name) else part.attr for part in parts}
    keys = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    return bool((names | keys) & set(SAYS_WHICH))


def questions(tree: ast.AST, words: set[str]) -> Iterator[tuple[int, str]]:
    """(line, source) of every place that asks which family it is given."""
    for node in ast.walk(tree):
        asks = False
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            texts = set().union(*(texts_in(side) for side in sides))
            asks = bool(texts & words) or bool(texts and any(says_which(s) for s in sides))
        elif isinstance(node, ast.Match):
            asks = says_which(node.subject)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            asks = node.func.attr in ASKING_METHODS and says_which(node.func.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asks = any(f.id in CLASSES for f in ast.walk(node) if isinstance(f, ast.Name))
        if asks:
            yield getattr(node, "lineno", 0), ast.unparse(node)


def test_every_architecture_is_in_the_tables_that_tests_go_by() -> None:
    from sloth.formats.gguf_archs import arch_of_model
    from tests.models.families import FIRST
    from tests.tiny_configs import GGUF_TYPES
    from tools.models_table import KNOWN_AS

    tables = {
        "FAMILIES of tests/models/families.py": FIRST.keys(),
        "GGUF_TYPES of tests/tiny_configs.py": GGUF_TYPES.keys()
        | {kind for kind in ARCHITECTURES if arch_of_model(kind) is None},
        "KNOWN_AS of tools/models_table.py": KNOWN_AS.keys(),
    }
    for table, known in tables.items():
        missing = ARCHITECTURES.keys() - known
        assert not missing, f"{sorted(missing)} missing in {table}"


@pytest.mark.parametrize("module", SHARED)
def test_no_shared_code_asks_which_family_it_serves(module: str) -> None:
    words = set() if module in NAME_TOKENIZERS else MODEL_TYPES
    found = list(questions(ast.parse(SLOTH[module].read_text()), words))
    assert not found, (
        f"{SLOTH[module].relative_to(ROOT)}:{found[0][0]}: `{found[0][1]}` asks which family it "
        "serves; let the family's own file say what differs, in its config, its layer specs or its "
        "twin's wiring"
    )


@pytest.mark.parametrize("module", SLOTH)
def test_model_files_are_reached_through_the_table(module: str) -> None:
    """So a family is added with its own files and a line, and no other file knows its name."""
    for line, imported in imports_of(SLOTH[module]):
        family = imported.removeprefix("sloth.models.")
        assert family not in FAMILIES or module == "sloth.models", (
            f"{SLOTH[module].relative_to(ROOT)}:{line} imports {imported}; go through "
            "sloth.models.ARCHITECTURES"
        )


@pytest.mark.parametrize(
    "code",
    [
        "if config.model_type == 'qwen2': pass",
        "x = 'gemma2' in names",
        "if family != 'other': pass",
        "if hf_config['model_type'] in ('a', 'b'): pass",
        "y = network.model_type.startswith('gem')",
        "match config.model_type:\n    case 'x': pass",
        "if isinstance(config, LlamaConfig): pass",
    ],
)
def test_the_rule_catches_each_kind_of_question(code: str) -> None:
    assert list(questions(ast.parse(code), MODEL_TYPES))


def test_looking_a_model_type_up_is_no_question() -> None:
    code = "kind = TABLE[config.model_type]\nif config['model_type'] not in TABLE: raise ValueError"
    assert not list(questions(ast.parse(code), MODEL_TYPES))
