"""Upstream's checkpoints: the imported network computes what upstream's own did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnssl_ext.engine.checkpoint import build_checkpoint, save_checkpoint
from nnssl_ext.finetuning.nnunet_plans import FinetuningPlan, plan_finetuning
from nnssl_ext.finetuning.pretrained import read_pretrained
from nnssl_ext.finetuning.upstream import to_primus_order
from nnssl_ext.models.primus import SegmentationPrimus, resample_positions
from nnssl_ext.planners import primus
from nnssl_ext.planners.primus import PrimusSize
from nnssl_ext.trainers.mae import MAETrainer

from .conftest import DATASET, checkpoint, network
from .test_nnunet_plans import nnunet_network
from .upstream_networks import DEPTH, HEADS, WIDTH, UpstreamTransformer, disturb, transformer_checkpoint

CUBES = (8, 8, 8)
PATCHES = [((16, 16, 32), CUBES, 0), ((16, 24, 32), CUBES, 0), ((8, 16, 12), (4, 8, 4), 3), ((6, 16, 8), (2, 4, 4), 0)]
"""Tokens of (2, 2, 4), (2, 3, 4), (2, 2, 3) and (3, 4, 2): rotary axes exchanged, or rows of no grid; and registers."""


@pytest.fixture(autouse=True)
def tiny_primus_m(monkeypatch: pytest.MonkeyPatch) -> None:
    """`PrimusM` is 143 million parameters large; here it is as small as the tests' networks."""
    size = PrimusSize(depth=DEPTH, num_heads=HEADS, head_width={3: WIDTH // HEADS})
    monkeypatch.setitem(primus.PRIMUS_SIZES, "M", size)


def image(patch_size: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(2, 1, *patch_size, generator=torch.Generator().manual_seed(3))


def planned(content: dict[str, Any], tmp_path: Path, name: str = "file.pth", **options: Any) -> FinetuningPlan:
    torch.save(content, tmp_path / name)
    return plan_finetuning(DATASET, tmp_path / name, "up", **options)


def imported(plan: FinetuningPlan) -> SegmentationPrimus:
    """The network that stock nnU-Net builds from the plans, with the weights that it loads."""
    net = nnunet_network(plan)
    load_pretrained_weights(net, str(plan.weights_path), verbose=False)
    assert isinstance(net, SegmentationPrimus)
    return net.eval()


@pytest.mark.parametrize(("patch_size", "token", "registers"), PATCHES)
@pytest.mark.parametrize("order", ["evamae", "primus"])
def test_an_imported_transformer_computes_what_upstreams_did(
    labelled_dataset: Path,
    tmp_path: Path,
    patch_size: tuple[int, ...],
    token: tuple[int, ...],
    registers: int,
    order: str,
) -> None:
    """Fails where the learned positions, the rotary axes or both are taken as they are, or reshaped as the grid, and
    where register tokens are lost."""
    theirs = UpstreamTransformer(patch_size, token, order, registers=registers).eval()
    content = transformer_checkpoint(theirs, patch_size, token if token != CUBES else None)
    plan = planned(content, tmp_path, token_order=order)
    x = image(patch_size)
    with torch.no_grad():
        expected = theirs(x)
        net = imported(plan)
        torch.testing.assert_close(net.token_map(x), expected, rtol=1e-4, atol=1e-4)
        net.eva.load_state_dict(theirs.eva.state_dict())
        taken_as_they_are = torch.allclose(net.token_map(x), expected, rtol=1e-2, atol=1e-2)
    assert taken_as_they_are is (order == "primus")


def test_only_the_right_exchange_of_rotary_axes_will_do() -> None:
    """The fault that the test above must see: positions converted, rotations not."""
    theirs = UpstreamTransformer((16, 16, 32), CUBES, "evamae").eval()
    own = UpstreamTransformer((16, 16, 32), CUBES, "primus").eval()
    converted, _ = to_primus_order(theirs.state_dict(), (2, 2, 4), HEADS)
    x = image((16, 16, 32))
    with torch.no_grad():
        own.load_state_dict(theirs.state_dict() | {"eva.pos_embed": converted["eva.pos_embed"]})
        assert not torch.allclose(own(x), theirs(x), rtol=1e-2, atol=1e-2)
        own.load_state_dict(converted)
        torch.testing.assert_close(own(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_positions_go_to_another_patch_along_the_right_axes(labelled_dataset: Path, tmp_path: Path) -> None:
    theirs = UpstreamTransformer((16, 16, 32), CUBES, "evamae")
    plan = planned(transformer_checkpoint(theirs, (16, 16, 32)), tmp_path, patch_size=(24, 16, 8))
    written = torch.load(plan.weights_path)["network_weights"]["eva.pos_embed"]
    converted, scattered = to_primus_order(theirs.state_dict(), (2, 2, 4), HEADS)
    assert not scattered
    assert torch.equal(written, resample_positions(converted["eva.pos_embed"], (2, 2, 4), (3, 2, 1)))
    assert plan.report["preprocessing"]["patch_size"] == [24, 16, 8]


def test_rotary_rows_of_no_grid_stay_on_their_patch(labelled_dataset: Path, tmp_path: Path) -> None:
    content = transformer_checkpoint(UpstreamTransformer((16, 24, 32), CUBES, "evamae"), (16, 24, 32))
    with pytest.raises(ValueError, match=r"mixed up the rotary positions .* Use -patch_size 16 24 32"):
        planned(content, tmp_path, patch_size=(16, 16, 32))


def test_an_encoder_one_level_down_and_positions_of_crops(labelled_dataset: Path, tmp_path: Path) -> None:
    """Contrastive methods: `encoder.eva`, a projector, a crop smaller than the recommended patch, a wrong stem name."""
    crop = (16, 16, 16)
    theirs = UpstreamTransformer(crop, CUBES, "evamae", decoder=False).eval()
    content = transformer_checkpoint(theirs, crop, prefix="encoder.")
    content["nnssl_adaptation_plan"] |= {"recommended_downstream_patchsize": (32, 32, 32)}
    content["nnssl_adaptation_plan"] |= {"keys_to_in_proj": ("projection.proj",)}
    plan = planned(content, tmp_path, patch_size=crop)
    x = image(crop)
    with torch.no_grad():
        torch.testing.assert_close(imported(plan).token_map(x), theirs(x), rtol=1e-4, atol=1e-4)
    left = {row["key"]: row["note"] for row in plan.report["keys"] if row["status"] == "left over"}
    assert left == dict.fromkeys(["encoder.mask_token", "projector.layer1.weight"], "serves the pretraining alone")
    found = read_pretrained(tmp_path / "file.pth")
    assert (found.position_grid, found.patch_size) == ((2, 2, 2), (32, 32, 32))


def named(method: str) -> dict[str, str]:
    return {"type": "Pretraining Method", "name": method}


def test_a_grid_that_no_patch_of_the_plan_has_is_refused(tmp_path: Path) -> None:
    content = transformer_checkpoint(UpstreamTransformer((16, 16, 32), CUBES, "evamae"), (16, 16, 16))
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"16 tokens, which is none of the grids .* pretrain_patch_size"):
        read_pretrained(tmp_path / "file.pth")
    content["nnssl_adaptation_plan"]["pretrain_patch_size"] = [16, 16, 32]
    torch.save(content, tmp_path / "file.pth")
    assert read_pretrained(tmp_path / "file.pth").position_grid == (2, 2, 4)


@pytest.mark.parametrize(
    ("change", "name", "decoder", "order", "warns"),
    [
        ({}, "file.pth", True, "evamae", False),
        ({"citations": []}, "file.pth", True, "evamae", False),
        ({"citations": []}, "file.pth", False, "evamae", True),
        ({"citations": [], "trainer_name": "SimMIMEvaTrainer_BS8"}, "file.pth", False, "primus", False),
        ({"citations": [named("SimMIM")]}, "file.pth", False, "primus", False),
        ({"citations": [named("Simple Masked Image Modeling")]}, "file.pth", False, "primus", False),
        ({"citations": [named("Jigsaw")]}, "file.pth", False, "evamae", True),
        ({}, "PrimusM-OpenMind-SimMIM.pth", False, "primus", False),
    ],
)
def test_the_checkpoint_tells_its_order_of_tokens(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict, name: str, decoder: bool, order: str, warns: bool
) -> None:
    patch_size = (16, 16, 32)
    theirs = UpstreamTransformer(patch_size, CUBES, order, decoder)
    torch.save({**transformer_checkpoint(theirs, patch_size), **change}, tmp_path / name)
    found = read_pretrained(tmp_path / name).weights["eva.pos_embed"]
    assert torch.equal(found, theirs.eva.pos_embed) is (order == "primus")
    assert ("--token_order primus" in caplog.text) is warns


def test_dino_of_another_rotation_is_refused(tmp_path: Path) -> None:
    """Catches a network that would compute something else without a word, whatever order is asked for."""
    content = transformer_checkpoint(UpstreamTransformer((16, 16, 32), CUBES, "primus"), (16, 16, 32))
    torch.save({**content, "citations": [named("DINOv2")]}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"file\.pth is named after DINO, .* half against half"):
        read_pretrained(tmp_path / "file.pth", "primus")


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"token order 'hwd' is not known; valid: evamae, primus"):
        read_pretrained(tmp_path / "file.pth", "hwd")


def spark_weights(trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As upstream's SparK saves a network: only `all_modules` of the encoder itself was trained."""
    untrained = network(seed=5).state_dict()
    return {
        key: value if key.startswith("encoder.") and ".all_modules." in key else untrained[key]
        for key, value in trained.state_dict().items()
    }


def test_untrained_aliases_never_win(labelled_dataset: Path, tmp_path: Path) -> None:
    """Each alias in turn would give another output: `conv`, and the decoder's copy of `all_modules`."""
    trained = network(seed=1).eval()
    disturb(trained, seed=2)
    plan = planned({**checkpoint(), "network_weights": spark_weights(trained)}, tmp_path)
    net = nnunet_network(plan)
    load_pretrained_weights(net, str(plan.weights_path), verbose=False)
    x = image((16, 16, 16))
    with torch.no_grad():
        ours, theirs = net.eval().encoder(x), trained.encoder(x)
    assert all(map(torch.equal, ours, theirs))
    notes = {row["note"] for row in plan.report["keys"] if row["status"] == "loaded"}
    assert all("aliases disagree" in note and "all_modules" in note for note in notes if note)
    assert any(notes)


def test_a_u_net_called_otherwise(labelled_dataset: Path, tmp_path: Path) -> None:
    """A student beside its teacher, as in BYOL: the one that the plan names counts."""
    trained = network(seed=1).eval()
    content = checkpoint()
    own = {key: value for key, value in trained.state_dict().items() if key.startswith("encoder.")}
    teacher = {f"target_{key}": value + 1 for key, value in own.items()}
    content["network_weights"] = {f"online_{key}": value for key, value in own.items()} | teacher
    plan_keys = content["nnssl_adaptation_plan"]
    plan_keys |= {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    plan_keys["keys_to_in_proj"] = [f"online_{key}" for key in plan_keys["keys_to_in_proj"]]
    plan = planned(content, tmp_path)
    net = nnunet_network(plan)
    load_pretrained_weights(net, str(plan.weights_path), verbose=False)
    state = net.state_dict()
    assert all(torch.equal(state[key], value) for key, value in own.items())
    left = {row["key"] for row in plan.report["keys"] if row["status"] == "left over"}
    assert left == set(teacher)


@pytest.mark.parametrize(("patch_size", "registers"), [((16, 24, 8), 3), ((24, 16), 0)], ids=["3d", "2d"])
def test_our_own_checkpoint_cut_down_to_upstreams_keys_keeps_its_order(
    tmp_path: Path, tiny_vit_plan: Any, patch_size: tuple[int, ...], registers: int
) -> None:
    """Catches register tokens that are left behind, and our own DINO taken for another's."""
    plan, trainer = tiny_vit_plan(patch_size), MAETrainer.configured([], "vit")
    (configuration,) = plan.raw["configurations"].values()
    configuration["architecture"]["arch_kwargs"]["num_register_tokens"] = registers
    task = trainer.build_task(plan.configuration(plan.configuration_names[0]), num_cases=4)
    content = build_checkpoint(task, trainer, plan, content_hashes=[])
    three = {key: content[key] for key in ("network_weights", "citations", "nnssl_adaptation_plan")}
    for name, part in (("whole.pth", content), ("dino.pth", three)):
        save_checkpoint(tmp_path / name, part)
    whole, cut = read_pretrained(tmp_path / "whole.pth"), read_pretrained(tmp_path / "dino.pth")
    assert cut.architecture == whole.architecture
    assert cut.position_grid == whole.position_grid
    assert all(torch.equal(value, whole.weights[key]) for key, value in cut.weights.items())
    assert set(whole.weights) == set(cut.weights) | set(cut.unused)
    assert ("register_tokens" in cut.weights) is (registers > 0)
