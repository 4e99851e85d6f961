"""Row 17: several examples in a row are several examples. Loss, gradients and logits are those they
have apart.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sloth
from sloth.data.batches import collate, collate_documents, padding_share
from sloth.data.dataset import Dataset, load_data
from sloth.data.examples import Example
from sloth.data.packing import pack
from sloth.train.trainer import Trainer
from tests import tolerance
from tests.oracles import save_tiny
from tests.train.fakes import ROWS, FakeModel, FakeTokenizer
from tests.train.runs import same, train, weights

# Sliding windows shorter than a document, several kinds of layers, q/k norms, a logit cap.
FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "gemma3_text")
SMALL = {"head_dim": 16, "sliding_window": 8}


# -- which examples share a row --------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_example_is_in_one_row_and_no_row_is_too_long(lengths):
    packing = pack(lengths, 50)
    assert sorted(index for row in packing.rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= 50 for row in packing.rows)
    assert packing.rows == pack(lengths, 50).rows


def test_the_tightest_row_is_taken():
    assert pack([6, 5, 4, 5], 10).rows == [[0, 2], [1, 3]]
    assert pack([7, 6, 3, 3], 10).rows == [[0, 2], [1, 3]]
    assert pack([5, 5, 5, 5], 10).fill == 1.0


def test_rows_are_as_few_as_a_plain_search_finds():
    """The bit set of free room, against looking at every row."""
    lengths = torch.randint(1, 97, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    rows: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rooms = [(128 - sum(lengths[i] for i in row), row) for row in rows]
        fitting = [room for room, _ in rooms if room >= lengths[index]]
        if fitting:
            next(row for room, row in rooms if room == min(fitting)).append(index)
        else:
            rows.append([index])
    assert len(pack(lengths, 128).rows) == len(rows)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="example 1 has 11 tokens, a row at most 10"):
        pack([3, 11], 10)


# -- what a row is ---------------------------------------------------------------------------------


def test_positions_begin_at_0_in_every_document_and_in_the_padding():
    a, b, c = (Example([n] * n, [n] * n) for n in (3, 2, 6))
    batch = collate_documents([[a, b], [c]], pad_id=9)
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]
    assert batch.tokens.tolist() == [[3, 3, 3, 2, 2, 9], [6] * 6]
    assert batch.labels[0].tolist() == [3, 3, 3, 2, 2, -100]
    assert (batch.num_tokens, batch.num_trained) == (11, 2 + 1 + 5)


def tiny(model_type, folder):
    model = sloth.load(
        save_tiny(model_type, folder, **(SMALL if model_type != "llama" else {})), device="cpu"
    )
    model.add_lora(r=4)
    torch.manual_seed(2)
    with torch.no_grad():  # B starts at zero, where A has no gradient
        for name, parameter in model.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def documents():
    generator = torch.Generator().manual_seed(5)
    made = []
    for length in (17, 5, 12, 1, 23):
        tokens = torch.randint(3, 130, (length,), generator=generator).tolist()
        labels = [t if i % 3 else -100 for i, t in enumerate(tokens, start=1)]
        made.append(Example(tokens, labels))
    return made


def gradients(model, batches):
    """Loss and gradients of a step over these batches."""
    model.network.zero_grad(set_to_none=True)
    num_trained = sum(batch.num_trained for batch in batches)
    total = torch.zeros(())
    for batch in batches:
        loss = model.loss(batch.tokens, batch.labels, batch.positions, num_trained=num_trained)
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad for p in model.network.parameters() if p.requires_grad)]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_row_17_packed_loss_and_gradients_equal_the_documents_apart(model_type, tmp_path):
    """Packed, padding-free and padded rows, against one document at a time."""
    model, made = tiny(model_type, tmp_path), documents()
    assert model.level == "fused"
    apart = gradients(model, [collate([one], 0) for one in made])
    packed = [[made[0], made[1], made[2]], [made[4], made[3]]]
    for batches in (
        [collate_documents(packed, 0)],
        [collate_documents([made], 0)],
        [collate(made, 0)],
    ):
        torch.testing.assert_close(gradients(model, batches), apart, **tolerance.ACCUMULATION)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_row_17_what_a_neighbour_says_changes_no_bit(model_type, tmp_path):
    """Another first document: the second one's logits, loss and gradients stay, bit by bit."""
    model, (a, b, *_) = tiny(model_type, tmp_path), documents()
    other = Example([t % 100 + 20 for t in a.tokens], a.labels)
    seen = []
    for first in (a, other):
        batch = collate_documents([[Example(first.tokens, [-100] * len(a.tokens)), b]], 0)
        with torch.no_grad():
            logits = model.logits(batch.tokens, batch.positions)[0, len(a.tokens) :]
        seen.append([logits, *gradients(model, [batch])])
    torch.testing.assert_close(seen[1], seen[0], **tolerance.BIT_EXACT)


def test_a_document_without_its_positions_would_leak(tmp_path):
    """The two tests above can fail: the same row as one document gives other numbers."""
    model, made = tiny("llama", tmp_path), documents()
    batch = collate_documents([made], 0)
    with torch.no_grad():
        apart = model.loss(batch.tokens, batch.labels, batch.positions)
        together = model.loss(batch.tokens, batch.labels)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(together, apart, **tolerance.ACCUMULATION)


# -- training on them ------------------------------------------------------------------------------


def test_a_packed_epoch_reads_every_example_once(tmp_path):
    model, read = FakeModel(), []
    plain = model.loss

    def loss(tokens, labels, positions, **rest):
        for row, starts in zip(tokens, positions == 0, strict=True):
            at = [*starts.nonzero()[:, 0].tolist(), len(row)]
            read.extend(tuple(row[a:b].tolist()) for a, b in zip(at, at[1:], strict=False))
        return plain(tokens, labels, positions, **rest)

    model.loss = loss
    report = Trainer(model, ROWS, output=tmp_path, packing=True, max_length=200, batch_size=2).run()
    data = load_data(ROWS, FakeTokenizer(), 200)
    padding = [one for one in read if set(one) == {FakeTokenizer().pad_id}]
    assert sorted(one for one in read if one not in padding) == sorted(
        tuple(example.tokens) for example in data.examples
    )
    assert report.tokens == data.counts.tokens
    assert report.trained_tokens == data.counts.trained_tokens
    assert len(report.losses) == 2


def test_an_epoch_in_one_step_is_the_same_step_packed_or_not(tmp_path):
    losses = []
    for settings_ in ({"batch_size": 11}, {"packing": True, "max_length": 200, "batch_size": 9}):
        run = Trainer(FakeModel(), ROWS, output=tmp_path / str(len(losses)), **settings_).run()
        losses.append(run.losses)
    torch.testing.assert_close(losses[1], losses[0], **tolerance.ACCUMULATION)


def test_packing_is_said_and_never_silently_off(tmp_path, capsys):
    Trainer(FakeModel(), ROWS, output=tmp_path, packing=True, max_length=200, max_steps=1).run()
    assert "packed into 3 rows, 92.8% full" in capsys.readouterr().out


def test_much_padding_becomes_documents_and_little_stays(tmp_path: Path):
    data = load_data(ROWS, FakeTokenizer(), 2048)
    lengths = data.row_lengths()
    few = [0, 0]
    assert isinstance(data, Dataset) and padding_share([lengths[row] for row in few]) == 0
    assert data.batch(few, 1, padding_free=True).positions is None
    batch = data.batch([0, 5], 1, padding_free=True)
    assert batch.tokens.shape == (1, lengths[0] + lengths[5])
    assert data.batch([0, 5], 1).tokens.shape == (2, lengths[5])


def test_a_packed_run_continues_bit_by_bit(tmp_path):
    """Rows are a pure function of the data, so a checkpoint need not hold them."""
    packed = {"packing": True, "max_length": 120, "max_steps": 4}
    model, whole = train(tmp_path / "whole", **packed)
    train(tmp_path / "half", stop_after=2, **packed)
    resumed, report = train(tmp_path / "half", resume=True, **packed)
    assert report.losses == whole.losses and same(weights(resumed), weights(model))
    with pytest.raises(ValueError, match="packing was True, now False"):
        train(tmp_path / "half", resume=True, **{**packed, "packing": False})
