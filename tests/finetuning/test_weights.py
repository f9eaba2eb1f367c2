from pathlib import Path
from typing import Any

import pytest
import torch

from nnssl_ext.engine.checkpoint import resenc_l
from nnssl_ext.finetuning.pretrained import Pretrained, read_pretrained
from nnssl_ext.finetuning.weights import Adapted, adapt_stem, adapt_weights, alias_groups, load_weights, save_weights

from .conftest import architecture, checkpoint, network

STEM = "encoder.stem.convs.0.all_modules.0.weight"
STEM_ALIAS = "encoder.stem.convs.0.conv.weight"
BLOCK = "encoder.stages.1.blocks.0.conv1.all_modules.0.weight"
BLOCK_ALIAS = "encoder.stages.1.blocks.0.conv1.conv.weight"
DECODER = "decoder.stages.0.convs.0.all_modules.0.weight"


def pretrained(tmp_path: Path, content: dict[str, Any] | None = None) -> Pretrained:
    path = tmp_path / "pretrained.pth"
    torch.save(content or checkpoint(), path)
    return read_pretrained(path)


def statuses(adapted: Adapted) -> dict[str, str]:
    """By name in the new network."""
    own = [row for row in adapted.rows if row.status != "left over"]
    return {name: row.status for row in own for name in (row.key, *row.aliases)}


def test_aliases_are_grouped_by_tensor_with_all_modules_first() -> None:
    groups = {group[0]: group for group in alias_groups(network())}
    assert groups[STEM][:2] == (STEM, f"decoder.{STEM}")
    assert set(groups[STEM]) == {STEM, STEM_ALIAS, f"decoder.{STEM}", f"decoder.{STEM_ALIAS}"}
    assert sum(map(len, groups.values())) == len(network().state_dict())


def test_resenc_l_has_upstreams_keys() -> None:
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    arch = resenc_l()
    with torch.device("meta"):
        net = get_network_from_plans(
            arch["network_class_name"], arch["arch_kwargs"], arch["_kw_requires_import"], 1, 1, allow_init=False
        )
    keys = list(net.state_dict())
    assert len(keys) == 956
    assert sum(key.startswith("encoder.") for key in keys) == 448
    assert sum(key.startswith("decoder.encoder.") for key in keys) == 448
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(102.35e6, rel=1e-4)
    assert sum(map(len, alias_groups(net))) == 956


def test_the_encoder_is_loaded_under_every_name_and_the_decoder_is_fresh(tmp_path: Path) -> None:
    source, target = pretrained(tmp_path), network(outputs=3, seed=1)
    adapted = adapt_weights(source, target)
    assert list(adapted.weights) == list(target.state_dict())
    for key, value in source.weights.items():
        if key.startswith(("encoder.", "decoder.encoder.")):
            assert torch.equal(adapted.weights[key], value), key
    assert torch.equal(adapted.weights[DECODER], target.state_dict()[DECODER])
    assert statuses(adapted)[DECODER] == "fresh"


def test_every_key_of_both_sides_is_accounted_for_once(tmp_path: Path) -> None:
    source, target = pretrained(tmp_path), network(outputs=3)
    rows = adapt_weights(source, target).rows
    ours = [name for row in rows if row.status != "left over" for name in (row.key, *row.aliases)]
    assert sorted(ours) == sorted(target.state_dict())
    taken = {name for row in rows if row.status in ("loaded", "adapted") for name in (row.key, *row.aliases)}
    left = {row.key for row in rows if row.status == "left over"}
    assert taken | left == set(source.weights)
    assert not taken & left


def test_the_decoder_is_transferred_on_request_but_never_the_heads(tmp_path: Path) -> None:
    source, target = pretrained(tmp_path), network(outputs=3, seed=1)
    adapted = adapt_weights(source, target, "encoder_decoder")
    assert torch.equal(adapted.weights[DECODER], source.weights[DECODER])
    fresh = {key for key, status in statuses(adapted).items() if status == "fresh"}
    assert fresh == {key for key in target.state_dict() if ".seg_layers." in key}


def test_an_untrained_decoder_is_not_transferred(tmp_path: Path) -> None:
    content = {**checkpoint(), "nnssl_pretraining": {"trains_decoder": False}}
    with pytest.raises(ValueError, match="did not train the decoder; use -transfer encoder"):
        adapt_weights(pretrained(tmp_path, content), network(), "encoder_decoder")


def test_where_aliases_disagree_all_modules_counts(tmp_path: Path) -> None:
    content = checkpoint()
    content["network_weights"] = {key: value.clone() for key, value in content["network_weights"].items()}
    content["network_weights"][BLOCK_ALIAS].zero_()
    trained = content["network_weights"][BLOCK]
    adapted = adapt_weights(pretrained(tmp_path, content), network(seed=1))
    assert torch.equal(adapted.weights[BLOCK], trained)
    assert torch.equal(adapted.weights[BLOCK_ALIAS], trained)
    (row,) = (row for row in adapted.rows if row.key == BLOCK)
    assert row.note == f"aliases disagree in the checkpoint; {BLOCK} counts"


def test_missing_aliases_are_completed(tmp_path: Path) -> None:
    content = checkpoint()
    kept = {k: v for k, v in content["network_weights"].items() if k.startswith("encoder.") and "all_modules" in k}
    skips = {k: v for k, v in content["network_weights"].items() if k.startswith("encoder.") and ".skip." in k}
    content["network_weights"] = kept | skips
    adapted = adapt_weights(pretrained(tmp_path, content), network(seed=1))
    assert torch.equal(adapted.weights[f"decoder.{STEM_ALIAS}"], kept[STEM])


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 3), (3, 1), (4, 2)])
def test_the_stem_answers_to_equal_channels_as_before(tmp_path: Path, old: int, new: int) -> None:
    source = pretrained(tmp_path, checkpoint(channels=old))
    target = network(new, seed=1)
    adapted = adapt_weights(source, target)
    assert statuses(adapted)[STEM] == "adapted"
    before, after = network(old, old), target
    before.load_state_dict(source.weights)
    after.load_state_dict(adapted.weights)
    image = torch.randn(1, 1, 16, 16, 16)
    old_map = before.encoder.stem(image.expand(-1, old, -1, -1, -1))
    new_map = after.encoder.stem(image.expand(-1, new, -1, -1, -1))
    assert torch.allclose(old_map, new_map, atol=1e-5)


def test_one_channel_is_repeated_and_divided() -> None:
    weight = torch.randn(4, 1, 3, 3, 3)
    assert torch.allclose(adapt_stem(weight, 3), weight.repeat(1, 3, 1, 1, 1) / 3)


def test_an_incomplete_encoder_is_refused(tmp_path: Path) -> None:
    content = checkpoint()
    content["network_weights"] = {k: v for k, v in content["network_weights"].items() if "encoder.stages.2" not in k}
    with pytest.raises(ValueError, match=r"pretrained.pth has no encoder\.stages\.2.*incomplete or of another arch"):
        adapt_weights(pretrained(tmp_path, content), network())


def test_another_width_is_refused(tmp_path: Path) -> None:
    content = checkpoint()
    weights = dict(content["network_weights"])
    for key in [key for key in weights if "encoder.stages.1.blocks.0.conv1" in key and key.endswith("0.weight")]:
        weights[key] = torch.zeros(9, 4, 3, 3, 3)
    content["network_weights"] = weights
    with pytest.raises(ValueError, match=r"\(9, 4, 3, 3, 3\).*only the input channels of the stem can be adapted"):
        adapt_weights(pretrained(tmp_path, content), network())


def test_keys_that_belong_nowhere_are_refused_unless_ignored(tmp_path: Path) -> None:
    content = checkpoint()
    content["network_weights"] = {**content["network_weights"], "encoder.extra.0.weight": torch.zeros(2, 2)}
    source = pretrained(tmp_path, content)
    with pytest.raises(ValueError, match=r"encoder\.extra\.0\.weight \(2, 2\).*--ignore_keys encoder"):
        adapt_weights(source, network())
    adapted = adapt_weights(source, network(), ignore=("encoder.extra",))
    assert [row.note for row in adapted.rows if row.key == "encoder.extra.0.weight"] == ["ignored on request"]


def test_what_lies_beside_upstreams_network_is_listed_and_left(tmp_path: Path) -> None:
    content = checkpoint()
    content["network_weights"] = {**content["network_weights"], "projector.0.weight": torch.zeros(2, 2)}
    rows = {row.key: row for row in adapt_weights(pretrained(tmp_path, content), network()).rows}
    assert (rows["projector.0.weight"].status, rows["projector.0.weight"].note) == (
        "left over",
        "serves the pretraining alone",
    )


def test_a_deeper_encoder_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    content = checkpoint()
    content["network_weights"] = {**content["network_weights"], "encoder.stages.3.x.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"encoder\.stages\.3\.x\.weight"):
        adapt_weights(pretrained(tmp_path, content), network())


def test_a_plain_unet_is_adapted_too(tmp_path: Path) -> None:
    content = checkpoint()
    source = network(name="PlainConvUNet")
    content["network_weights"] = source.state_dict()
    plan = content["nnssl_adaptation_plan"]
    plan["architecture_plans"] |= {"arch_class_name": "PlainConvUNet"}
    plan["architecture_plans"]["arch_kwargs"] = architecture(name="PlainConvUNet")["arch_kwargs"]
    plan |= {"key_to_stem": source.key_to_stem, "keys_to_in_proj": list(source.keys_to_in_proj)}
    adapted = adapt_weights(pretrained(tmp_path, content), network(2, name="PlainConvUNet", seed=1))
    assert [row.key for row in adapted.rows if row.status == "adapted"] == [
        "encoder.stages.0.0.convs.0.all_modules.0.weight"
    ]


def test_files_load_into_stock_nnunet_and_keep_aliases_small(tmp_path: Path) -> None:
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    adapted = adapt_weights(pretrained(tmp_path), network(3, outputs=3, seed=1))
    path = tmp_path / "adapted.pth"
    save_weights(path, adapted, ["cite me"])
    assert path.stat().st_size < 2 * 4 * sum(p.numel() for p in network(3, outputs=3).parameters())
    stock = network(3, outputs=5, seed=2)
    load_pretrained_weights(stock, str(path), verbose=False)
    assert torch.equal(stock.state_dict()[BLOCK], adapted.weights[BLOCK])


def test_loading_keeps_the_networks_own_values_where_nothing_was_pretrained(tmp_path: Path) -> None:
    path = tmp_path / "adapted.pth"
    adapted = adapt_weights(pretrained(tmp_path), network(outputs=3, seed=1))
    save_weights(path, adapted, [])
    net = network(outputs=3, seed=2)
    own = net.state_dict()[DECODER].clone()
    load_weights(net, path)
    assert torch.equal(net.state_dict()[DECODER], own)
    assert torch.equal(net.state_dict()[BLOCK], adapted.weights[BLOCK])


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "adapted.pth"
    save_weights(path, adapt_weights(pretrained(tmp_path), network()), [])
    with pytest.raises(ValueError, match=r"was made for another network: .*stem"):
        load_weights(network(2), path)
    with pytest.raises(FileNotFoundError, match="nnssl_plan_finetuning"):
        load_weights(network(), tmp_path / "none.pth")


def test_the_file_holds_tensors_and_builtins_only(tmp_path: Path) -> None:
    path = tmp_path / "adapted.pth"
    save_weights(path, adapt_weights(pretrained(tmp_path), network()), [{"name": "nnssl"}])
    content = torch.load(path, weights_only=True)
    assert content["citations"] == [{"name": "nnssl"}]
    assert all(type(value) is torch.Tensor for value in content["network_weights"].values())
