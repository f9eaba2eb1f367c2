"""Checkpoints on the hub, with the hub's library replaced: nothing is downloaded here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import HfHubHTTPError

from nnssl_ext.cli import plan_finetuning as command
from nnssl_ext.core.records import read_json, write_json
from nnssl_ext.finetuning.hub import Address, choose_file, locate, parse_address
from nnssl_ext.finetuning.nnunet_plans import plan_finetuning
from nnssl_ext.finetuning.pretrained import read_pretrained

from .conftest import DATASET, checkpoint
from .upstream_networks import UpstreamTransformer, transformer_checkpoint

CLIENT_ERROR = next(base for base in HfHubHTTPError.__bases__ if base is not OSError)
"""What the library's HTTP client raises without a network; no OSError since version 1."""


class Hub:
    """A repository of files, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        self.error: Exception | None = None

    def list_repo_files(self, repository: str, revision: str | None = None) -> list[str]:
        self.asked.append(("list", repository, revision))
        if self.error is not None:
            raise self.error
        return sorted(path.name for path in self.folder.iterdir())

    def hf_hub_download(
        self, repository: str, file: str, revision: str | None = None, local_files_only: bool = False
    ) -> str:
        """As the library does, a file of the cache is given without the hub; here every file is in the cache."""
        self.asked.append((file, repository, revision))
        if not (self.folder / file).is_file():
            raise LocalEntryNotFoundError(f"{file} is not in the cache") if local_files_only else self.error
        return str(self.folder / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "snapshot")
    hub.folder.mkdir()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.hf_hub_download)
    return hub


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://AnonRes/ResEncL-OpenMind-MAE", ("AnonRes/ResEncL-OpenMind-MAE", None, None)),
        ("hf://a/b@v1.0", ("a/b", "v1.0", None)),
        ("hf://a/b/fold_all/checkpoint_final.pth", ("a/b", None, "fold_all/checkpoint_final.pth")),
        ("hf://a/b@main/c.pth", ("a/b", "main", "c.pth")),
        ("https://huggingface.co/a/b", ("a/b", None, None)),
        ("https://huggingface.co/a/b/", ("a/b", None, None)),
        ("https://huggingface.co/a/b/resolve/main/x/c.pth?download=true", ("a/b", "main", "x/c.pth")),
        ("https://huggingface.co/a/b/blob/0a1b/c.safetensors", ("a/b", "0a1b", "c.safetensors")),
    ],
)
def test_addresses(text: str, expected: tuple) -> None:
    assert parse_address(text) == Address(repository=expected[0], revision=expected[1], file=expected[2])


@pytest.mark.parametrize("path", ["checkpoint.pth", "/data/a/b.pth", "./hf/a", Path("x.pth")])
def test_paths_of_this_machine_stay_what_they_are(path: str | Path) -> None:
    assert locate(path) == Path(path)


@pytest.mark.parametrize("text", ["https://zenodo.org/record/1/files/a.pth", "hf://onlyone", "s3://a/b"])
def test_other_addresses_are_refused_with_the_right_form(text: str) -> None:
    with pytest.raises(ValueError, match=r"no address of a checkpoint on the hub: write hf://OWNER/REPO"):
        locate(text)


def test_the_command_fetches_the_only_checkpoint_and_names_it(
    labelled_dataset: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(checkpoint(), hub.folder / "checkpoint_final.pth")
    torch.save({}, hub.folder / "checkpoint_best.pth")
    (hub.folder / "README.md").touch()
    with caplog.at_level("INFO"):
        command.main(["-d", "7", "-pc", "hf://a/b@v1", "-n", "hub", "--no_preprocess"])
    assert hub.asked == [("list", "a/b", "v1"), ("checkpoint_final.pth", "a/b", "v1")]
    info = read_json(labelled_dataset / "ptPlans__hub.json")["pretrain_info"]
    assert info["checkpoint_name"] == "checkpoint_final.pth"
    assert f"checkpoint checkpoint_final.pth of a/b: {hub.folder / 'checkpoint_final.pth'}" in caplog.text


def test_the_repositorys_name_tells_the_method(labelled_dataset: Path, hub: Hub) -> None:
    """Catches a name that is thrown away: positions of SimMIM's, taken for those of EvaMAE, would be permuted."""
    theirs = UpstreamTransformer((8, 16, 12), (4, 8, 4), "primus", decoder=False)
    content = transformer_checkpoint(theirs, (8, 16, 12), (4, 8, 4))
    torch.save({**content, "citations": []}, hub.folder / "checkpoint_final.pth")
    plan = plan_finetuning(DATASET, "hf://AnonRes/PrimusM-OpenMind-SimMIM", "hub")
    written = torch.load(plan.weights_path)["network_weights"]["eva.pos_embed"]
    assert torch.equal(written, theirs.eva.pos_embed)


def test_safetensors_bring_their_plan(hub: Hub) -> None:
    from safetensors.torch import save_file

    content = checkpoint(channels=2)
    tensors = {key: value.clone() for key, value in content["network_weights"].items()}
    save_file(tensors, hub.folder / "model.safetensors")
    write_json(hub.folder / "adaptation_plan.json", content["nnssl_adaptation_plan"])
    found = read_pretrained(locate("hf://a/b"))
    assert [file for file, *_ in hub.asked] == ["list", "model.safetensors", "adaptation_plan.json"]
    assert found.num_channels == 2
    assert all(torch.equal(found.weights[key], value) for key, value in tensors.items())


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    write_json(tmp_path / "adaptation_plan.json", {})
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read: .* Get a fresh copy"):
        read_pretrained(tmp_path / "model.safetensors")


def test_without_the_extra_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"hf://a/b needs huggingface_hub. Install it: pip install 'nnssl_ext\[hub\]'"):
        locate("hf://a/b")


UNREACHABLE = [CLIENT_ERROR("no route"), OfflineModeIsEnabled("no route"), LocalEntryNotFoundError("no route")]


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(("address", "words"), [("hf://a/b/c.pth", r"c\.pth"), ("hf://a/b", "the files")])
def test_what_the_hub_does_not_give_is_named(hub: Hub, error: Exception, address: str, words: str) -> None:
    """Fault: the HTTP client's errors, which are no OSErrors, reach the user as a traceback."""
    hub.error = error
    with pytest.raises(FileNotFoundError, match=rf"does not give {words} of a/b: no route\. Without a network"):
        locate(address)


@pytest.mark.parametrize("error", UNREACHABLE, ids=lambda error: type(error).__name__)
def test_without_a_network_the_cache_is_read_and_the_log_says_so(
    hub: Hub, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    hub.error = error
    (hub.folder / "checkpoint_final.safetensors").touch()
    (hub.folder / "adaptation_plan.json").touch()
    assert locate("hf://a/b") == hub.folder / "checkpoint_final.safetensors"
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["WARNING"]
    assert "does not list a/b (no route): taking its checkpoint_final.safetensors in the cache" in caplog.text


def test_which_file_is_asked_for_where_none_is_named() -> None:
    assert choose_file(["fold_0/checkpoint_final.pth", "x.pth"], "a/b") == "fold_0/checkpoint_final.pth"
    assert choose_file(["x.safetensors", "y.md"], "a/b") == "x.safetensors"
    with pytest.raises(ValueError, match=r"several checkpoints: x\.pth, y\.pth\. Name one: -pc hf://a/b/x\.pth"):
        choose_file(["x.pth", "y.pth"], "a/b")
    with pytest.raises(FileNotFoundError, match=r"a/b has no file that ends in \.pth or \.safetensors"):
        choose_file(["README.md"], "a/b")
