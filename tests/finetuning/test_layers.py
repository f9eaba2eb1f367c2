import pytest

from nnssl_ext.finetuning.layers import layer_scales


def test_each_stage_below_the_decoder_learns_more_slowly() -> None:
    names = [
        "encoder.stem.convs.0.conv.weight",
        "encoder.stages.0.blocks.0.conv1.conv.weight",
        "encoder.stages.1.blocks.0.conv1.conv.weight",
        "decoder.transpconvs.0.weight",
        "decoder.seg_layers.0.weight",
    ]
    assert list(layer_scales(names, 0.5).values()) == pytest.approx([0.125, 0.25, 0.5, 1.0, 1.0])


def test_without_decay_all_scales_are_one() -> None:
    assert set(layer_scales(["encoder.stem.a", "encoder.stages.3.a", "decoder.a"], 1.0).values()) == {1.0}
