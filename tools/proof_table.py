"""What is proved of each model type, and by which test.

    python -m tools.proof_table          # the table, from what pytest collects
    python -m tools.proof_table --run    # the same from what passes: runs those tests and no others

A cell holds the number of tests; below the table each cell's first test is named. A cell that no
test proves is empty. What a test proves is told by its name, and of which model type by its
parameters. GPU tests are skipped without one, so they count only where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

from sloth.formats.wrapper import WRAPPERS
from sloth.models import ARCHITECTURES

# column -> the tests that prove it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "reference equal": (
        "test_reference_logits_equal_hugging_face_bit_for_bit",
        "test_logits_equal_the_whole_models_on_text",
    ),
    "gradients": ("test_loss_and_every_gradient_match_hugging_face",),
    "decode": ("test_prefill_equals_decode_past_the_window",),
    "packed": ("test_packed_documents_are_blind_to_each_other",),
    "twin": ("test_twin_equals_the_model_file",),
    "twin, packed": ("test_documents_are_blind_to_each_other",),
    "folder": ("test_saved_folder_equals_the_loaded_one", "test_every_prefix_on_disk_is_read"),
    "NF4 in": (
        "test_4_bit_folders_of_bitsandbytes_are_read",
        "test_4_bit_tensors_are_read_behind_every_prefix",
    ),
    "NF4 out": ("test_4_bit_folders_are_read_by_hugging_face",),
    "PEFT in, merge": (
        "test_adapters_of_peft_are_read_and_merged_as_by_peft",
        "test_adapters_by_peft_are_read_and_merged_as_by_peft",
    ),
    "PEFT out": (
        "test_adapter_on_every_projection_agrees_with_peft",
        "test_adapters_are_read_by_peft",
        "test_peft_applies_the_adapter_to_the_whole_model",
    ),
    "GGUF in": ("test_sloth_computes_the_same_from_file_and_folder",),
    "GGUF out": ("test_a_model_of_every_type_is_written_and_verified",),
    "template": ("test_templates_render_byte_for_byte_as_in_transformers",),
}
# What a multimodal model's text tower computes and writes is its text model's: this test shows that
# it is the same network, and stands in the cells whose tests are of the text model.
SAME_NETWORK = "test_the_text_tower_is_the_text_models_own_network"
OF_THE_NETWORK = (
    *("gradients", "decode", "packed", "twin", "twin, packed", "NF4 out", "GGUF in", "GGUF out"),
)
# The template test names models; these are the types they have.
TEMPLATES: dict[str, str | tuple[str, ...]] = {
    "llama-3": "llama",
    "llama-3.1": "llama",
    "llama-3.2": "llama",
    "mistral-v1": "mistral",
    "mistral-v2": "mistral",
    "mistral-v3": "mistral",
    "mistral-v7": "mistral",
    "mistral-nemo": "mistral",
    "mistral-tekken": "ministral",
    "mistralai-Ministral-3-14B-Reasoning-2512": "ministral3",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral3",
    "qwen-2.5": "qwen2",
    "qwen-3": "qwen3",
    "gemma-2": "gemma2",
    "gemma-3": ("gemma3_text", "gemma3"),
    "HuggingFaceTB-SmolLM3-3B": "smollm3",
}
MODEL_TYPES = (*ARCHITECTURES, *WRAPPERS)

Proofs = dict[tuple[str, str], list[str]]


def proofs(items: Iterable[Any]) -> Proofs:
    """(model type, column) -> node ids, of pytest's items."""
    columns = {name: (column,) for column, names in COLUMNS.items() for name in names}
    columns[SAME_NETWORK] = OF_THE_NETWORK
    found: Proofs = defaultdict(list)
    for item in items:
        shown = columns.get(getattr(item, "originalname", None) or item.name, ())
        for model_type in _model_types(item) if shown else ():
            for column in shown:
                found[model_type, column].append(item.nodeid)
    return dict(found)


def _model_types(item: Any) -> tuple[str, ...]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "variant" in parameters:
        variant = item.cls.variants[parameters["variant"]]
        return (variant.get("model_type", item.cls.model_type),)
    variants = getattr(item.module, "TWINNED", {})
    for value in parameters.values():
        if not isinstance(value, str):
            continue
        if value in MODEL_TYPES:
            return (value,)
        if value in variants:
            return (str(variants[value]["model_type"]),)
        if value in TEMPLATES:
            types = TEMPLATES[value]
            return (types,) if isinstance(types, str) else types
    return ()


def markdown(found: Proofs) -> str:
    """The table, and under it the first test of each cell."""
    lines = [f"| model type | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    named: list[str] = []
    for model_type in MODEL_TYPES:
        cells = [found.get((model_type, column), []) for column in COLUMNS]
        counts = " | ".join(str(len(ids)) if ids else "" for ids in cells)
        lines.append(f"| `{model_type}` | {counts} |")
        named += [
            f"{model_type}, {column}: {ids[0]}"
            for column, ids in zip(COLUMNS, cells, strict=True)
            if ids
        ]
    return "\n".join([*lines, "", *named])


class _Collector:
    """pytest plugin: keeps the items that prove something, and which of them passed."""

    def __init__(self) -> None:
        self.found: Proofs = {}
        self.passed: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        self.found = proofs(items)
        wanted = {node_id for ids in self.found.values() for node_id in ids}
        items[:] = [item for item in items if item.nodeid in wanted]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="count only what passes now")
    run = parser.parse_args().run
    collector = _Collector()
    if run:
        status = pytest.main(["-q", "tests"], plugins=[collector])
    else:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = pytest.main(["-q", "--collect-only", "tests"], plugins=[collector])
        if status != pytest.ExitCode.OK:
            raise SystemExit(said.getvalue())
    found = collector.found
    if run:
        found = {cell: [i for i in ids if i in collector.passed] for cell, ids in found.items()}
    print(markdown(found))
    raise SystemExit(int(status))


if __name__ == "__main__":
    main()
