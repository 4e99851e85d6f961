"""The model card: README.md beside exported weights, with the metadata that the hub reads.

Front matter as https://huggingface.co/docs/hub/model-cards describes it. A base that came from a
local folder is named by its last part only, and has no `base_model` there: the hub accepts its own
repositories alone, and a path of one's machine is nobody's business. No secret gets in: the
whole text is redacted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sloth import __version__
from sloth.redact import Redactor
from sloth.train.facts import DataFacts, Training
from sloth.train.plot import plot_losses

MAX_LOSS_ROWS = 12
_HUB_DATA = "hf://datasets/"
# Where to write and how to go on, not what was trained.
_UNSAID = {"output", "resume", "allow_change", "trackers", "project", "save_steps", "eval_data"}


@dataclass(frozen=True)
class Subject:
    """What the card is about. revision: the base's commit on the hub, None for local files;
    license: of the base, if it says one; is_adapter: PEFT files rather than a whole model.
    """

    base: str
    revision: str | None
    license: str | None
    is_adapter: bool
    is_quantized: bool

    @property
    def base_name(self) -> str:
        """Without a path of this machine."""
        return self.base if self.revision else Path(self.base).name


def write_card(folder: Path, subject: Subject, training: Training | None) -> None:
    """README.md in an existing folder; with a training, the loss curve's pictures beside it."""
    picture = None
    if training is not None and training.losses:
        paths = plot_losses(folder, training.losses, training.eval_losses)
        picture = next((paths[n].name for n in ("loss_png", "loss_svg") if n in paths), None)
    text = Redactor().text(render_card(subject, training, picture))
    (folder / "README.md").write_text(text, encoding="utf-8")


def render_card(subject: Subject, training: Training | None, picture: str | None) -> str:
    """The card's text. picture: file name of the loss curve."""
    kind = "LoRA adapter" if subject.is_adapter else "fine-tuned model"
    parts = [
        _front_matter(subject, training),
        f"# {subject.base_name}: {kind}",
        f"Made with sloth {__version__} from {_base_in_words(subject)}.",
    ]
    if training is not None:
        parts += _training_parts(training, picture)
    return "\n\n".join([*parts, _usage(subject)]) + "\n"


def _front_matter(subject: Subject, training: Training | None) -> str:
    values: dict[str, Any] = {
        "library_name": "peft" if subject.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sloth", "lora"] if subject.is_adapter else ["sloth"],
    }
    if subject.revision:
        values["base_model"] = subject.base
        values["base_model_relation"] = "adapter" if subject.is_adapter else "finetune"
    if subject.license:
        values["license"] = subject.license
    if training is not None and training.facts.data.name.startswith(_HUB_DATA):
        owner_and_name = training.facts.data.name.removeprefix(_HUB_DATA).split("/")[:2]
        values["datasets"] = ["/".join(owner_and_name).split("@")[0]]
    return f"---\n{yaml.safe_dump(values, sort_keys=True)}---"


def _base_in_words(subject: Subject) -> str:
    where = f"commit `{subject.revision}`" if subject.revision else "local files"
    stored = ", its weights in 4 bits (NF4)" if subject.is_quantized else ""
    return f"`{subject.base_name}` ({where}{stored})"


def _training_parts(training: Training, picture: str | None) -> list[str]:
    facts = training.facts
    rows = {
        "data": _data_in_words(facts.data),
        "data fingerprint": f"`{facts.data.fingerprint}`",
        "base weights": f"sha256 of samples `{facts.base}`",
        "steps": f"{len(training.losses)}",
        "tokens read": f"{training.tokens:,}, of which trained {training.trained_tokens:,}",
        "time": f"{training.seconds:.0f} s on {facts.device}",
    }
    if facts.eval_data is not None:
        rows["held out"] = _data_in_words(facts.eval_data)
    settings = {
        name: value
        for name, value in facts.settings.items()
        if name not in _UNSAID and value is not None and value != []
    }
    return [
        "## Training",
        _table(("", ""), rows.items()),
        *([f"![Loss by step]({picture})"] if picture else []),
        _loss_table(training.losses, training.eval_losses),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```",
        "## Versions",
        _table(("", ""), facts.machine.items()),
    ]


def _data_in_words(data: DataFacts) -> str:
    counts = data.counts
    name = data.name if data.name.startswith(_HUB_DATA) else Path(data.name).name
    name += f" (commit `{data.revision}`)" if data.revision else ""
    return (
        f"{name}: {counts.rows:,} rows, {counts.examples:,} examples, {counts.tokens:,} tokens, "
        f"{counts.trained_tokens / max(counts.tokens, 1):.1%} trained"
    )


def _loss_table(losses: list[float], eval_losses: Mapping[int, float]) -> str:
    """Evenly spaced steps, the first and the last among them, and those of evaluations."""
    last = len(losses)
    count = min(last, MAX_LOSS_ROWS)
    steps = {1 + round(i * (last - 1) / max(count - 1, 1)) for i in range(count)}
    evaluated = sorted(eval_losses)
    steps |= set(evaluated[:: -(-len(evaluated) // MAX_LOSS_ROWS) or 1])
    header = ("step", "loss", "held-out loss") if eval_losses else ("step", "loss")
    rows = [
        (
            str(step),
            _number(losses[step - 1]),
            *((_number(eval_losses.get(step, math.nan)),) if eval_losses else ()),
        )
        for step in sorted(steps)
    ]
    return _table(header, rows)


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _usage(subject: Subject) -> str:
    revision = f', revision="{subject.revision}"' if subject.revision else ""
    base = f'"{subject.base_name}"{revision}'
    if not subject.is_adapter:
        return (
            "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")\n'
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n\n'
            '```python\nimport sloth\n\nmodel = sloth.load("THIS_FOLDER")\n```'
        )
    quant = ', quant="nf4"' if subject.is_quantized else ""
    return (
        "## Use\n\nWith PEFT:\n\n```python\nfrom peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n'
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n```\n\n'
        "With sloth:\n\n```python\nimport sloth\n\n"
        f'model = sloth.load({base}{quant}, adapter="THIS_FOLDER")\n```'
    )
