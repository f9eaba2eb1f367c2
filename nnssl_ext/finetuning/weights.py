"""Pretrained weights made to fit a new network, with an account of every key.

One tensor of nnU-Net's networks has several names: `conv` and `all_modules.0` are the same layer, and the decoder holds
the encoder again. Here such names form one group, which is filled once. Where a checkpoint's aliases disagree,
`all_modules` counts: masked-convolution pretraining (SparK) trains that one and leaves `conv` at its initial values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nnssl_ext.core.records import atomic_path
from nnssl_ext.finetuning.layers import in_encoder
from nnssl_ext.finetuning.pretrained import Pretrained
from nnssl_ext.models.primus import PrimusBackbone, resample_positions

Transfer = Literal["encoder", "encoder_decoder"]
Status = Literal["loaded", "adapted", "fresh", "left over"]
HEAD = ".seg_layers."
"""In the name of every output layer: nnU-Net never loads these."""
FRESH_KEY = "nnssl_fresh_keys"
"""In the weights file: the keys that were not pretrained. `SSLFinetuneTrainer` initialises them by its own seed."""
PRETEXT = "serves the pretraining alone"
_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class KeyRow:
    """What became of one tensor."""

    key: str
    """Its name in the new network, or in the checkpoint when it was left over."""
    status: Status
    """`loaded` unchanged, `adapted` to another shape, `fresh` (initialised anew), `left over` in the checkpoint."""
    shape: tuple[int, ...]
    """Its shape."""
    note: str = ""
    """Why, or how."""
    aliases: tuple[str, ...] = ()
    """Other names of the same tensor."""


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """A full state dict for a new network, and the account of its keys."""

    weights: dict[str, torch.Tensor]
    """Every key of the network, aliases sharing memory."""
    rows: tuple[KeyRow, ...]
    """One per tensor of the network, then one per tensor left over."""

    @property
    def fresh_keys(self) -> list[str]:
        """Every name of every tensor that was initialised anew."""
        return [name for row in self.rows if row.status == "fresh" for name in (row.key, *row.aliases)]

    @property
    def content_hash(self) -> str:
        """Of what was pretrained, the same as `weights_file_hash` of the file."""
        return _content_hash(self.weights, self.fresh_keys)


def _content_hash(weights: Mapping[str, torch.Tensor], fresh: Iterable[str]) -> str:
    """SHA-256 of names, types, shapes and values, as hex; not of a file's bytes, which hold its temporary name too."""
    digest = hashlib.sha256()
    for name in sorted(set(weights).difference(fresh)):
        value = weights[name]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_file_hash(path: Path) -> str:
    """Hash of the pretrained tensors in a file of `save_weights`.

    Raises:
        FileNotFoundError: If there is no file.
    """
    content = _read(path)
    return _content_hash(content["network_weights"], content[FRESH_KEY])


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no pretrained weights at {path}. Write them again: nnssl_plan_finetuning")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def alias_groups(network: nn.Module) -> list[tuple[str, ...]]:
    """Names of each tensor of a network, preferred first: `all_modules` before `conv`, `encoder` before its copy."""
    groups: dict[int, list[str]] = {}
    for name, value in network.state_dict(keep_vars=True).items():
        groups.setdefault(id(value), []).append(name)
    return [tuple(sorted(names, key=_preference)) for names in groups.values()]


def _preference(name: str) -> tuple[bool, bool, str]:
    return "all_modules" not in name, name.startswith("decoder.encoder."), name


def adapt_stem(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """A stem for another number of input channels: the sum over the old channels, repeated, divided by the new number.

    Where all channels of an image are equal, the response is what it was. With one pretrained channel this is
    upstream's rule: repeated and divided.

    Args:
        weight: (features, old channels, *kernel).
        num_channels: New number of channels.
    """
    total = weight.sum(1, keepdim=True)
    return total.expand(-1, num_channels, *total.shape[2:]).contiguous() / num_channels


def adapt_weights(
    pretrained: Pretrained, network: nn.Module, transfer: Transfer = "encoder", ignore: Sequence[str] = ()
) -> Adapted:
    """Fits a checkpoint to a network, strictly.

    Args:
        pretrained: The checkpoint.
        network: The new network, freshly initialised; its own values serve where nothing is transferred.
        transfer: `encoder` (stem and stages) or `encoder_decoder`. Output layers are always fresh.
        ignore: Prefixes of checkpoint keys that may be left over without a known reason.

    Raises:
        ValueError: If a transferred part is missing, untrained or of another shape, or the checkpoint holds keys that
            belong nowhere.
    """
    if transfer == "encoder_decoder" and pretrained.trains_decoder is False:
        raise ValueError(f"the pretraining of {pretrained.name} did not train the decoder; use -transfer encoder")
    state = network.state_dict()
    weights: dict[str, torch.Tensor] = {}
    rows: list[KeyRow] = []
    used: set[str] = set()
    for names in alias_groups(network):
        part = _part(names, pretrained)
        if part == "encoder" or (part == "decoder" and transfer == "encoder_decoder"):
            grid = network.grid if isinstance(network, PrimusBackbone) else ()
            value, row, taken = _take(names, tuple(state[names[0]].shape), pretrained, grid)
            used.update(taken)
        else:
            why = "output layer" if part == "head" else "decoder not transferred"
            value, row = state[names[0]].clone(), _row(names, "fresh", state[names[0]], why)
        weights.update(dict.fromkeys(names, value))
        rows.append(row)
    left = [key for key in pretrained.weights if key not in used]
    rows += [_left_over(key, pretrained, set(state), transfer, ignore) for key in left]
    rows += [KeyRow(key=key, status="left over", shape=shape, note=PRETEXT) for key, shape in pretrained.unused.items()]
    return Adapted(weights={name: weights[name] for name in state}, rows=tuple(rows))


def _part(names: Iterable[str], pretrained: Pretrained) -> Literal["encoder", "decoder", "head"]:
    if any(HEAD in name for name in names):
        return "head"
    prefixes = (f"{pretrained.encoder_key}.", f"{pretrained.stem_key}.")
    of_encoder = any(name.startswith(prefixes) or in_encoder(name) for name in names)
    return "encoder" if of_encoder else "decoder"


def _row(names: Sequence[str], status: Status, value: torch.Tensor, note: str) -> KeyRow:
    return KeyRow(key=names[0], status=status, shape=tuple(value.shape), note=note, aliases=tuple(names[1:]))


def _take(
    names: tuple[str, ...], shape: tuple[int, ...], pretrained: Pretrained, grid: tuple[int, ...]
) -> tuple[torch.Tensor, KeyRow, list[str]]:
    """The checkpoint's value for one group of names, adapted where only input channels or the patch differ.

    Of a transformer's positions the grid of tokens counts, since two grids may have as many tokens.
    """
    present = [name for name in names if name in pretrained.weights]
    if not present:
        raise ValueError(
            f"{pretrained.name} has no {names[0]} (nor its aliases), which the network needs. The checkpoint is "
            "incomplete or of another architecture; without a decoder, use -transfer encoder"
        )
    value = pretrained.weights[present[0]]
    note = ""
    if any(not torch.equal(value, pretrained.weights[name]) for name in present[1:]):
        note = f"aliases disagree in the checkpoint; {present[0]} counts"
    if names[0] == pretrained.position_key and grid != pretrained.position_grid:
        value = resample_positions(value, pretrained.position_grid, grid).clone()
        note = f"interpolated from {pretrained.position_grid} to {grid} tokens"
        return value, _row(names, "adapted", value, note), present
    if tuple(value.shape) == shape:
        return value.clone(), _row(names, "loaded", value, note), present
    stem = {f"{key}.weight" for key in pretrained.in_proj_keys}
    if stem.isdisjoint(names) or (value.shape[0], *value.shape[2:]) != (shape[0], *shape[2:]):
        raise ValueError(
            f"{names[0]} has shape {tuple(value.shape)} in {pretrained.name} but {shape} in the network; only the "
            "input channels of the stem can be adapted"
        )
    adapted = adapt_stem(value, shape[1])
    note = f"{note}; " * bool(note) + f"from {value.shape[1]} to {shape[1]} input channels"
    return adapted, _row(names, "adapted", adapted, note), present


def _left_over(key: str, pretrained: Pretrained, known: set[str], transfer: Transfer, ignore: Sequence[str]) -> KeyRow:
    shape = tuple(pretrained.weights[key].shape)
    if HEAD in key:
        return KeyRow(key=key, status="left over", shape=shape, note="output layer of the pretraining")
    if key in known or (transfer == "encoder" and key.startswith("decoder.")):
        return KeyRow(key=key, status="left over", shape=shape, note="decoder not transferred")
    if key.startswith(tuple(ignore)):
        return KeyRow(key=key, status="left over", shape=shape, note="ignored on request")
    raise ValueError(
        f"{pretrained.name} holds {key} {shape}, which has no place in the network. If it may be dropped, say so: "
        f"--ignore_keys {key.split('.')[0]}"
    )


def save_weights(path: Path, adapted: Adapted, citations: Sequence[str]) -> None:
    """Writes adapted weights for nnU-Net's `-pretrained_weights`: CPU tensors, readable with `weights_only=True`."""
    content = {"network_weights": adapted.weights, FRESH_KEY: adapted.fresh_keys, "citations": list(citations)}
    with atomic_path(path) as temporary:
        torch.save(content, temporary)


def load_weights(network: nn.Module, path: Path, expected: str | None = None) -> None:
    """Loads what was pretrained from a file of `save_weights`; what was fresh keeps the network's own initial values.

    Args:
        network: Receives it.
        path: The file.
        expected: Its content hash; None: whatever it holds.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it does not fit the network, or holds other weights than expected.
    """
    content = _read(path)
    fresh = set(content[FRESH_KEY])
    if expected not in (None, _content_hash(content["network_weights"], fresh)):
        raise ValueError(other_weights(path))
    state = network.state_dict()
    weights = {key: value for key, value in content["network_weights"].items() if key not in fresh}
    wrong = [key for key, value in weights.items() if key not in state or state[key].shape != value.shape]
    absent = [key for key in state if key not in weights and key not in fresh and HEAD not in key]
    if wrong or absent:
        raise ValueError(
            f"{path} was made for another network: {', '.join((wrong + absent)[:_SHOWN])} do not fit. "
            "Write it again: nnssl_plan_finetuning"
        )
    network.load_state_dict(state | weights)


def other_weights(path: Path) -> str:
    """What to say of a file that does not hold the weights of its plans."""
    return (
        f"{path} holds other weights than those that {path.stem} was planned with. Plan the arm again, under a name of "
        "its own where it has results: nnssl_plan_finetuning -n NAME"
    )
