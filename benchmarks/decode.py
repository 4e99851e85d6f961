"""Decoding with the adapter unmerged: tokens a second of sloth and of HF + PEFT + bitsandbytes.

    python -m benchmarks.decode FOLDER --rows 1,64 --out RESULTS

FOLDER is an NF4 checkpoint with any weights. Every program runs in a process of its own, decodes
greedily after prompts of 64 to 128 tokens, and is timed from the first new token to the last: what
the prompt takes is shown apart. LoRA's B is not zero, so the adapter takes part. Writes decode.json
and decode.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import ALPHA, DEVICE, GIB, TARGETS, emit
from benchmarks.run import Processes

RANK, SHORTEST, LONGEST = 16, 64, 128
PROGRAMS = ("sloth", "hf")


def prompts_of(rows: int, vocab_size: int) -> list[list[int]]:
    """As many random prompts, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (rows,), generator=generator).tolist()
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def now() -> float:
    """Seconds, when the device has done all it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def wake_adapter(parameters: Iterator[tuple[str, Tensor]]) -> None:
    """Give LoRA's B, zero when attached, values that change every logit."""
    for name, parameter in parameters:
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)


def measure(name: str, rows: int, new: int, load_s: float, decode: Callable[[int], None]) -> None:
    """decode(n) produces n tokens a row. The prompt's part is what one token takes."""
    decode(min(new, 8))  # compiles, records, warms up
    started = now()
    decode(1)
    prompt_s = now() - started
    started = now()
    decode(new)
    rest_s = now() - started - prompt_s
    peak = torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0
    row = {"who": name, "rows": rows, "new_tokens": new, "load_s": load_s, "peak_gib": peak}
    emit(
        {
            **row,
            "prompt_s": prompt_s,
            "ms_per_step": 1e3 * rest_s / (new - 1),
            "tok_s": rows * (new - 1) / rest_s,
        }
    )


@torch.no_grad()
def run_sloth(folder: Path, all_rows: list[int], new: int) -> None:
    """`generate_tokens` as `model.generate` calls it."""
    import sloth
    from sloth.infer.generate import generate_tokens
    from sloth.infer.text import ready_to_generate

    started = now()
    model = sloth.load(folder, dtype=torch.bfloat16)
    model.add_lora(sloth.LoraConfig(r=RANK, alpha=ALPHA))
    load_s = now() - started
    network = model.network
    wake_adapter(network.named_parameters())
    for rows in all_rows:
        prompts = prompts_of(rows, network.config.vocab_size)

        def decode(count: int, prompts: list[list[int]] = prompts) -> None:
            for _ in generate_tokens(network, prompts, count):
                pass

        with ready_to_generate(network, rows):
            measure("sloth", rows, new, load_s, decode)


@torch.no_grad()
def run_hf(folder: Path, all_rows: list[int], new: int) -> None:
    """transformers' `generate` on a PEFT model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    started = now()
    where = {"": DEVICE.index or 0} if DEVICE.type == "cuda" else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=where, attn_implementation="sdpa"
    )
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).eval()
    load_s = now() - started
    wake_adapter(model.named_parameters())
    for rows in all_rows:
        prompts = prompts_of(rows, model.config.vocab_size)
        width = max(map(len, prompts))
        tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)

        def decode(count: int, tokens: Tensor = tokens, mask: Tensor = mask) -> None:
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    do_sample=False,
                    min_new_tokens=count,
                    max_new_tokens=count,
                    pad_token_id=0,
                )

        measure("hf", rows, new, load_s, decode)


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one line per program and number of rows."""
    lines = ["| program | rows | tok/s | ms a step | prompt, s | load, s | peak, GiB |"]
    lines.append("| --- | --: | --: | --: | --: | --: | --: |")
    for r in sorted(results, key=lambda r: (r["rows"], PROGRAMS.index(r["who"]))):
        lines.append(
            f"| {r['who']} | {r['rows']} | {r['tok_s']:.0f} | {r['ms_per_step']:.2f} | "
            f"{r['prompt_s']:.3f} | {r['load_s']:.1f} | {r['peak_gib']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path)
    add("--rows", default="1,64", help="batch sizes")
    add("--new-tokens", type=int, default=256, help="of each row")
    add("--programs", default=",".join(PROGRAMS))
    add("--program", choices=PROGRAMS, help="measure this one in this process")
    add("--peer-site", type=Path, help="folder with the peer's packages")
    add("--timeout", type=float, default=600.0, help="seconds a program may take")
    add("--out", type=Path)
    args = parser.parse_args()
    if args.program:
        all_rows = [int(rows) for rows in args.rows.split(",")]
        run = run_sloth if args.program == "sloth" else run_hf
        run(args.folder, all_rows, args.new_tokens)
        return
    processes, results = Processes(args.peer_site, args.timeout), []
    for program in args.programs.split(","):
        command = ["benchmarks.decode", str(args.folder.resolve()), "--program", program]
        command += ["--rows", args.rows, "--new-tokens", str(args.new_tokens)]
        found, why = processes.run(command, is_peer=program == "hf")
        results += found
        if why is not None:
            print(f"{program}: {why}")
    print(table(results))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "decode.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "decode.md").write_text(table(results))


if __name__ == "__main__":
    main()
