"""Pushes to the hub: private, whole, with a card, without a secret; and what refusals say."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import constants

import sloth
from sloth import cli
from sloth.errors import UploadFailed
from sloth.pushing import Pushed, push
from tests.formats.hub_server import PUSHED, READER, WRITER, Traffic, serve
from tests.oracles import save_tiny_llama

SLOTH = f"sloth {sloth.__version__}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(base, adapter)."""
    place = tmp_path_factory.mktemp("push")
    base = save_tiny_llama(place / "base")
    model = sloth.load(base, device="cpu").add_lora(r=2)
    for name, parameter in model.network.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_()
    return base, model.save_adapter(place / "adapter")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What a loopback hub was sent; the library's settings point there."""
    pushes = Traffic()
    server = serve(tmp_path, pushes)
    pushes.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", pushes.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    yield pushes
    server.shutdown()


@pytest.fixture
def model(folders):
    base, adapter = folders
    return sloth.load(base, adapter=adapter, device="cpu")


def unpacked(hub, place, repo="me/tuned"):
    place.mkdir()
    for path, content in hub.files.items():
        assert WRITER.encode() not in content
        (place / path.removeprefix(f"{repo}/")).write_bytes(content)
    return place


def test_an_adapter_is_pushed_private_and_comes_back_as_it_was(hub, tmp_path, folders, model):
    """Row 32, too: the token is in no file and no message of the library's or ours."""
    assert model.push("me/tuned") == Pushed(f"{hub.address}/me/tuned", PUSHED)
    assert hub.repos == {"me/tuned": True}
    base, adapter = folders
    copy = unpacked(hub, tmp_path / "copy")
    assert {path.name for path in copy.iterdir()} == {path.name for path in adapter.iterdir()}
    weights = "adapter_model.safetensors"
    assert (copy / weights).read_bytes() == (adapter / weights).read_bytes()
    assert list(hub.large.values()) == [(adapter / weights).read_bytes()]
    assert "library_name: peft" in (copy / "README.md").read_text()
    assert sloth.load(base, adapter=copy, device="cpu").has_adapter


def test_public_and_merged_and_the_message_are_as_asked(hub, tmp_path, model):
    model.push("me/tuned", private=False, merged=True, message="first")
    assert hub.repos == {"me/tuned": False} and hub.messages == ["first"]
    copy = unpacked(hub, tmp_path / "copy")
    assert "library_name: transformers" in (copy / "README.md").read_text()
    assert not sloth.load(copy, device="cpu").has_adapter


def test_a_public_repository_gets_nothing_without_private_false(hub, model):
    hub.repos["me/tuned"] = False
    with pytest.raises(UploadFailed, match="everyone can read it; give private=False"):
        model.push("me/tuned")
    assert not hub.files
    assert model.push("me/tuned", private=False).commit == PUSHED


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", "no Hugging Face token on this machine.*hf auth login.*HF_TOKEN"),
        ("hf_" + "old" * 10, "does not accept this machine's token.*hf auth login"),
        (READER, "may not write there; it needs write permission for 'me'"),
    ],
)
def test_a_refusal_says_what_to_do_and_not_the_token(hub, monkeypatch, model, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UploadFailed, match=said) as caught:
        model.push("me/tuned")
    assert not hub.files and (not token or token not in str(caught.value))


def test_a_hub_that_is_not_there_is_one_sentence(hub, monkeypatch, model):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UploadFailed, match="me/tuned: the hub could not be reached"):
        model.push("me/tuned")


def test_the_command_pushes_a_folder_as_it_is_and_of_a_run_what_it_trained(
    hub, tmp_path, folders, capsys
):
    base, adapter = folders
    assert cli.main(["push", str(adapter), "me/tuned"]) == 0
    assert hub.repos == {"me/tuned": True} and hub.messages == [f"LoRA adapter, {SLOTH}"]
    assert capsys.readouterr().out == f"{hub.address}/me/tuned  private, commit {PUSHED[:12]}\n"
    copy = unpacked(hub, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == {
        p.name: p.read_bytes() for p in adapter.iterdir()
    }
    run = tmp_path / "run"
    shutil.copytree(base, run / "model")
    (run / "metrics.jsonl").write_text("{}")
    hub.files.clear()
    assert cli.main(["push", str(run), "me/whole", "--public", "--message", "first"]) == 0
    assert hub.repos["me/whole"] is False and hub.messages[1:] == ["first"]
    assert set(hub.files) == {f"me/whole/{path.name}" for path in base.iterdir()}


def test_the_command_uploads_no_strange_file(hub, tmp_path, folders, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folders[1], copy)
    for name in (".env", "notes.docx", "deep/adapter_config.json"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("secret")
        assert cli.main(["push", str(copy), "me/tuned"]) == 2
        assert f"no part of a model: {name}; nothing is uploaded" in capsys.readouterr().err
        (copy / name).unlink()
    (copy / "adapter_model.safetensors").unlink()
    assert cli.main(["push", str(copy), "me/tuned"]) == 2
    assert "holds no weights" in capsys.readouterr().err
    assert cli.main(["push", str(tmp_path), "me/tuned"]) == 2
    assert "no adapter_config.json or config.json" in capsys.readouterr().err
    assert cli.main(["push", str(folders[1]), "tuned"]) == 2
    assert "one is written owner/name" in capsys.readouterr().err
    assert not hub.files and not hub.repos


@pytest.mark.parametrize("name", ["tuned", "a/b/c", "me/tu ned", "../x/y", ""])
def test_a_name_that_is_no_repository_is_refused(name):
    with pytest.raises(ValueError, match="one is written owner/name"):
        push(object(), name, private=True, merged=False)
