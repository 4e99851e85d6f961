"""New tokens: the tokenizer learns them, embedding and head get rows, and an adapter carries them.

A model may have more rows than its tokenizer has tokens (Qwen pads to 151,936); new tokens take
those first, and only then the matrices grow, to as many rows as there are tokens. A full export
says so in config.json's `vocab_size`. An adapter takes the rows along, trained: PEFT loads it on a
base that was resized to as many rows, sloth resizes by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from sloth.embedding import fill_rows, with_new_rows
from sloth.errors import AdapterMismatch
from sloth.lora import BASE_LAYER, EMBEDDING, HEAD
from sloth.lora_config import LoraConfig
from sloth.models.decoder import Decoder

if TYPE_CHECKING:
    from sloth.model import Model

INITS = ("mean", "normal", "zeros")


def add_tokens(model: Model, tokens: Sequence[str], init: str, special: bool) -> list[int]:
    """Grow tokenizer and network; ids of the new tokens. Errors as `Model.add_tokens`."""
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if isinstance(tokens, str):
        raise ValueError(f"tokens must be a list of texts, got the text {tokens!r}")
    tokenizer = model.tokenizer
    refused = [token for token in tokens if not token or tokenizer.id_of(token) is not None]
    if refused or not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(
            "add_tokens needs at least one token, each once, not empty and new to the tokenizer"
            + (f"; it has {', '.join(map(repr, refused))}" if refused else f", got {list(tokens)}")
        )
    if model.has_adapter:
        raise AdapterMismatch(
            "the model has an adapter already, which could not carry the new rows; add tokens "
            "first, then the adapter"
        )
    grown = tokenizer.with_tokens(tokens, special)
    ids = [index for token in tokens if (index := grown.id_of(token)) is not None]
    assert len(ids) == len(tokens), "the grown tokenizer knows what was added"
    num_known = min(tokenizer.vocab_size, model.config.vocab_size)
    grow_network(model.network, max(ids) + 1, "zeros")
    for module in _row_modules(model.network):
        fill_rows(module.weight.data, ids, num_known, init)
    model.take_tokenizer(grown)
    return ids


def grow_network(network: Decoder, num_rows: int, init: str) -> None:
    """Give embedding and head at least `num_rows` rows; those there stay as they are."""
    if num_rows <= network.config.vocab_size:
        return
    for module in _row_modules(network):
        weight = module.weight
        rows = with_new_rows(weight.detach(), num_rows, init)
        module.weight = nn.Parameter(rows, requires_grad=weight.requires_grad)
    if network.lm_head is not None:
        network.lm_head.out_features = num_rows
    network.config = replace(network.config, vocab_size=num_rows)


def rows_of_adapter(config: LoraConfig, tensors: Mapping[str, Tensor]) -> int:
    """How many rows of a vocabulary an adapter speaks of; 0 for none."""
    whole = [f"{path}{leaf}" for path in (EMBEDDING, HEAD) for leaf in (".weight", BASE_LAYER)]
    sizes = [len(tensors[name]) for name in whole if name in tensors]
    sizes += [max(ids) + 1 for ids in config.token_rows.values()]
    return max(sizes, default=0)


def carrying(config: LoraConfig, network: Decoder, ids: Sequence[int]) -> LoraConfig:
    """`config` with the rows of new tokens in it, wherever it does not train them all.

    Raises AdapterMismatch where another adapter stands in their place.
    """
    if not ids:
        return config
    needed = ["embed_tokens"] if network.tied else ["embed_tokens", "lm_head"]
    rows = {name: list(given) for name, given in config.token_rows.items()}
    if network.tied and config.modules_to_save:
        if set(config.modules_to_save) != {"embed_tokens", "lm_head"}:
            raise AdapterMismatch(
                f"modules_to_save={config.modules_to_save} gives the tied head a matrix of its "
                "own, and the new tokens have rows in both; name embed_tokens and lm_head"
            )
        return config
    for name in needed:
        if name in config.modules_to_save:
            continue
        given = rows.setdefault(name, [])
        given += [index for index in ids if index not in given]
    return LoraConfig(**{**config.model_dump(), "trainable_token_indices": rows or None})


def _row_modules(network: Decoder) -> list[Any]:
    """What has a row for every token."""
    head = network.lm_head
    return [network.model.embed_tokens, *([] if head is None else [head])]
