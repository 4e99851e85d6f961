"""What a program that imports sloth sees: a quick quiet import, names, one family of errors."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sloth
from sloth import errors
from tests.oracles import save_tiny_llama

MOST_IMPORT_SECONDS = 0.3  # beyond torch's own import
ROOT = Path(__file__).resolve().parent.parent

ERRORS = (
    "UnknownModel UnsupportedConfig CheckpointMismatch KernelUnavailable AdapterMismatch NoTargets "
    "DataError TokenizerMissing OutputExists NonFiniteGradients"
).split()


# With None for a module, Python neither finds nor imports it, as if it were not installed.
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import importlib, sloth
from pathlib import Path
for path in sorted(Path("sloth").rglob("*.py")):
    importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))

from sloth.kernels.engine import HAS_TRITON
from tests.train.fakes import ROWS, FakeTokenizer
assert not HAS_TRITON
model = sloth.load(sys.argv[1], device="cpu", quant="nf4")
model._tokenizer = FakeTokenizer()
report = model.train(ROWS, max_steps=1, lora=sloth.LoraConfig(r=2), output=sys.argv[2])
assert model.level == "fused" and report.losses[0] > 0, (model.level, report.losses)
"""


def run_python(code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)


def test_import_prints_nothing_and_needs_no_torch() -> None:
    done = run_python("import sloth, sys; assert 'torch' not in sys.modules, 'torch'")
    assert done.stdout == done.stderr == ""


def test_import_is_quick_beyond_torch() -> None:
    code = (
        "import torch, time; began = time.perf_counter(); import sloth; "
        "print(time.perf_counter() - began)"
    )
    assert min(float(run_python(code).stdout) for _ in range(3)) < MOST_IMPORT_SECONDS


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['sloth', '--help']\n"
        "from sloth.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    assert "train" in run_python(code).stdout


def test_every_module_imports_and_a_model_trains_where_triton_is_not_installed(
    tmp_path: Path,
) -> None:
    run_python(WITHOUT_TRITON, save_tiny_llama(tmp_path / "tiny"), tmp_path / "run")


def test_public_names_are_all_there() -> None:
    for name in sloth.__all__:
        assert getattr(sloth, name) is not None
    assert set(sloth.__all__) <= set(dir(sloth))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = sloth.lode


@pytest.mark.parametrize("name", ERRORS)
def test_errors_share_one_base(name: str) -> None:
    assert issubclass(getattr(errors, name), errors.SlothError)
    assert getattr(sloth.errors, name) is getattr(errors, name)


def test_load_stays_callable_after_every_import(tmp_path: Path) -> None:
    """A module of the same name would replace the function once something imports it."""
    folder = save_tiny_llama(tmp_path / "tiny")
    tokens = torch.tensor([[1, 5, 9, 3]])
    first = sloth.load(str(folder)).logits(tokens)
    second = sloth.load(folder).logits(tokens)
    importlib.import_module("sloth.cli")
    third = sloth.load(folder).logits(tokens)
    assert torch.equal(first, second) and torch.equal(first, third)
