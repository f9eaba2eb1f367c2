import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nnssl_ext.core.records import (
    apply_overrides,
    atomic_path,
    describe,
    file_hash,
    from_dict,
    read_json,
    to_dict,
    write_json,
)


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1e-2
    """Step size."""
    name: str = "sgd"
    """Which one."""


@dataclass(frozen=True, kw_only=True)
class Outer:
    ratio: float = 0.75
    """Share of blocks hidden,
    in (0, 1)."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes."""
    limit: int | None = None
    """No limit by default."""
    optim: Inner = field(default_factory=Inner)
    """The optimiser."""


def test_a_record_survives_json():
    record = Outer(ratio=0.5, sizes=(4, 5, 6), optim=Inner(lr=0.1))
    assert from_dict(Outer, json.loads(json.dumps(to_dict(record)))) == record


def test_an_unknown_key_names_file_and_valid_keys():
    with pytest.raises(ValueError, match=r"plans\.json: Inner has no field 'learning'\. Valid: lr, name"):
        from_dict(Outer, {"optim": {"learning": 1}}, where="plans.json")


def test_a_wrong_type_names_the_field():
    with pytest.raises(ValueError, match=r"optim\.lr: .*fast"):
        from_dict(Outer, {"optim": {"lr": "fast"}})


def test_a_records_own_check_speaks_for_itself():
    """Catches a dump of the whole record behind a message that names the value already."""

    @dataclass(frozen=True)
    class Checked:
        ratio: float

        def __post_init__(self) -> None:
            if self.ratio > 1:
                raise ValueError(f"ratio={self.ratio} must be 1 or less.")

    with pytest.raises(ValueError, match=r"^plans\.json: Checked: ratio=2\.0 must be 1 or less\.$"):
        from_dict(Checked, {"ratio": 2.0}, where="plans.json")


def test_overrides_reach_nested_fields_and_keep_the_rest():
    changed = apply_overrides(Outer(), ["optim.lr=1e-3", "sizes=[7, 8]", "limit=3", "optim.name=adamw"])
    assert changed == Outer(sizes=(7, 8), limit=3, optim=Inner(lr=1e-3, name="adamw"))
    assert apply_overrides(changed, ["limit=None"]).limit is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ratio", "not of the form name=value"),
        ("ration=1", "Valid: limit, optim, ratio, sizes"),
        ("ratio.x=1", "ratio has no fields"),
        ("optim.mom=1", "Valid: lr, name"),
        ("ratio=many", "ratio"),
    ],
)
def test_a_bad_override_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(Outer(), [override])


def test_settings_are_described_by_the_text_beneath_them():
    rows = {row.name: row for row in describe(Outer(limit=9))}
    assert rows["ratio"].doc == "Share of blocks hidden,\nin (0, 1)."
    assert rows["optim.lr"].default == 1e-2
    assert rows["optim.lr"].type == "float"
    assert rows["limit"].type == "int | None"
    assert "optim" not in rows


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path):
    target = tmp_path / "a.json"
    write_json(target, [1])
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(target) == [1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_nan_never_reaches_a_json_file(tmp_path: Path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_broken_json_is_named(tmp_path: Path):
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ValueError, match=r"b\.json is not valid JSON"):
        read_json(tmp_path / "b.json")


def test_file_hash_is_sha256(tmp_path: Path):
    (tmp_path / "c").write_bytes(b"abc")
    assert file_hash(tmp_path / "c") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
