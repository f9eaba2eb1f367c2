import pytest

from nnssl_ext.core.records import from_dict, to_dict
from nnssl_ext.dataset.splits import Split
from nnssl_ext.finetuning.config import FinetuningConfig, read_config

FOLDS = (Split(("a", "b"), ("c",)),)


def test_the_defaults_are_nnunets_recipe() -> None:
    config = FinetuningConfig(splits=FOLDS)
    assert (config.lr, config.weight_decay, config.num_epochs, config.iterations_per_epoch) == (1e-2, 3e-5, 1000, 250)
    assert (config.optim.name, config.optim.momentum, config.optim.nesterov, config.optim.clip) == (
        "sgd",
        0.99,
        True,
        12,
    )
    assert (config.schedule, config.warmup_steps, config.frozen_steps) == ("poly", 0, 0)


def test_upstreams_lengths_at_1000_epochs() -> None:
    config = FinetuningConfig(splits=FOLDS, schedule="sawtooth")
    assert config.decoder_warmup_steps == 25 * 250
    assert config.decoder_steps == config.frozen_steps == 50 * 250
    assert config.warmup_steps == 50 * 250


def test_lengths_scale_with_the_run_unless_given() -> None:
    short = FinetuningConfig(splits=FOLDS, schedule="sawtooth", num_epochs=20, iterations_per_epoch=20)
    assert (short.decoder_warmup_steps, short.decoder_steps, short.warmup_steps) == (10, 20, 20)
    given = FinetuningConfig(splits=FOLDS, schedule="warmup", num_epochs=20, iterations_per_epoch=20, warmup_epochs=2.5)
    assert given.warmup_steps == 50


def test_the_record_survives_json() -> None:
    config = FinetuningConfig(splits=FOLDS, layer_decay=0.8, pretraining_content_hashes=("ab",))
    assert from_dict(FinetuningConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"splits": ()}, "splits is empty"),
        ({"splits": (Split(("a", "b"), ("b",)),)}, "fold 0 trains and validates on b"),
        ({"splits": (*FOLDS, Split(("a",), ()))}, "fold 1 has no case to train or to validate on"),
        ({"num_epochs": 0}, "num_epochs=0"),
        ({"layer_decay": 1.5}, r"layer_decay=1.5 must lie in \(0, 1\]"),
        ({"frozen_encoder_epochs": -1.0}, "frozen_encoder_epochs=-1.0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"schedule": "warmup", "num_epochs": 3, "warmup_epochs": 3.0}, "spends 750 of 750 steps"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FinetuningConfig(**{"splits": FOLDS, **change})


def test_plans_without_settings_say_how_to_get_them() -> None:
    with pytest.raises(ValueError, match=r"nnUNetPlans: no 'nnssl_finetuning'.*nnssl_plan_finetuning"):
        read_config({"plans_name": "nnUNetPlans"})


def test_a_misspelt_setting_lists_the_valid_ones() -> None:
    plans = {"plans_name": "p", "nnssl_finetuning": {"splits": [], "learning_rate": 1}}
    with pytest.raises(ValueError, match=r"no field 'learning_rate'. Valid: .*lr"):
        read_config(plans)
