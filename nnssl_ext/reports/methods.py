"""`docs/methods.md`, written from the registry: what each method is, asks for, costs and hands over.

Words come from the code: `TaskInfo`, the docstrings of the method's module and trainer, and the texts beneath its
settings. Figures come from two files beside the page, which are measured and committed: `methods/cost.json`
(`benchmarks/bench_methods.py`) and `methods/learning.md`, the table of whether a method learns anything of its own.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl_ext.core.records import FieldDescription, describe, read_json

if TYPE_CHECKING:
    from nnssl_ext.engine.task import PretrainTrainer

PAGE, FIGURES = "methods.md", "methods"
COST_FILE, LEARNING_FILE = "cost.json", "learning.md"
COMMAND = "make docs"
REFERENCE = "MAETrainer"
"""The trainer whose step the others' are measured in."""
KINDS = {"cnn": "U-Net", "vit": "transformer"}
_COST = "time {time:.1f}x, memory {memory:.1f}x, views {views:.0%} of the time,"
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_LINK = r"[arXiv:\1](https://arxiv.org/abs/\1)"
_INTRO = f"""\
# Methods

Written by `{COMMAND}` from the code; change the docstrings, not this page. `nnssl_train --list` and
`nnssl_train -tr NAME --describe` show the same in a terminal.

All methods run on the same engine, the same crops and the plan's network, so that what differs between two runs is the
method. A U-Net is one of nnU-Net's, a transformer is Primus; the plan says which (docs/plans.md). What is pretrained
goes to `nnssl_plan_finetuning` (docs/finetuning.md).
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a step takes, in steps of `REFERENCE` on the same network and crops."""

    conditions: str
    """How it was measured, in a sentence or two."""
    steps: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By kind of backbone and trainer: `time` and `memory`, and the share of its own time that `views` take."""

    def text(self, kind: str, name: str, form: str = "{time:.1f}x, {memory:.1f}x, {views:.0%}") -> str:
        """Such as `1.4x, 1.1x, 3%`; `not measured` where figures are missing."""
        measured = self.steps.get(kind, {})
        return form.format(**measured[name]) if name in measured else "not measured"


def write_methods(docs: Path) -> None:
    """Writes the page into the folder of documents."""
    (docs / PAGE).write_text(methods_page(docs / FIGURES), encoding="utf-8")


def methods_page(figures: Path) -> str:
    """The page as it should be now.

    Args:
        figures: Folder of the measured figures; what is missing there is said to be, or left out.
    """
    from nnssl_ext.engine.task import TRAINERS

    path = figures / COST_FILE
    cost = Cost(**read_json(path)) if path.is_file() else Cost(conditions="", steps={})
    trainers = [TRAINERS.get(name) for name in TRAINERS.names()]
    learning = figures / LEARNING_FILE
    blocks = [_INTRO, "## Overview\n", _overview(trainers, cost)]
    if learning.is_file():
        blocks += ["## Does it learn?\n", learning.read_text(encoding="utf-8")]
    blocks += ["## Settings of every trainer\n", _common_settings()]
    for module, members in _by_module(trainers):
        blocks.append(_section(module, members, cost))
    return "\n".join(block.strip("\n") + "\n" for block in blocks)


def _by_module(trainers: Sequence[type[PretrainTrainer]]) -> list[tuple[Any, list[type[PretrainTrainer]]]]:
    modules: dict[str, list[type[PretrainTrainer]]] = {}
    for trainer in trainers:
        modules.setdefault(trainer.__module__, []).append(trainer)
    return [(sys.modules[name], members) for name, members in modules.items()]


def _overview(trainers: Sequence[type[PretrainTrainer]], cost: Cost) -> str:
    rows = []
    for trainer in trainers:
        info, name = trainer.task.info, trainer.__name__
        costs = [cost.text(kind, name) for kind in KINDS if kind in info.encoders]
        rows.append(
            (f"[{name}](#{name.lower()})", info.idea, _kinds(info.encoders), needs_text(trainer), " / ".join(costs))
        )
    head = ("trainer", "idea", "runs on", "data", f"a step's time and memory, in {REFERENCE}'s, and share of views")
    note = f"\n{cost.conditions}\n" if cost.conditions else ""
    return _table(head, rows) + note


def _common_settings() -> str:
    from nnssl_ext.engine.task import PretrainTrainer

    own = [field.name for field in dataclasses.fields(PretrainTrainer) if field.name != "task_config"]
    rows = [row for row in describe(PretrainTrainer()) if row.name.split(".")[0] in own]
    text = "Set with `nnssl_train --set NAME=VALUE`. Where a method's own default differs, its section says so.\n\n"
    return text + _settings(rows, {})


def _section(module: Any, members: Sequence[type[PretrainTrainer]], cost: Cost) -> str:
    """A module's methods; its docstring is told once."""
    parts = []
    text = _paragraphs(module.__doc__)
    for trainer in members:
        parts.append(f"## {trainer.__name__}\n\n{text}\n\n{_paragraphs(trainer.__doc__)}")
        parts.append(_facts(trainer, cost))
        parts.append(_own_settings(trainer))
        text = f"The idea is told under {members[0].__name__}."
    return "\n".join(f"{part.strip()}\n" for part in parts)


def _facts(trainer: type[PretrainTrainer], cost: Cost) -> str:
    info = trainer.task.info
    costs = [
        f"{cost.text(kind, trainer.__name__, _COST)} on a {KINDS[kind]}" for kind in KINDS if kind in info.encoders
    ]
    lines = [
        f"**Idea**: {info.idea}.",
        f"**Paper**: {_ARXIV.sub(_LINK, info.paper)}.",
        f"**Runs on**: {_kinds(info.encoders)}.",
        f"**Asks of the data**: {needs_text(trainer)}.",
        f"**Goes to fine-tuning**: {_transfers(trainer)}.",
        f"**Cost of a step**, in steps of {REFERENCE}: {'; '.join(costs)}. It holds {_memory(trainer)}.",
    ]
    if info.choose:
        lines.append(f"**Choose it** {info.choose}")
    return "\n".join(f"- {line}" for line in lines)


def _kinds(encoders: Iterable[str]) -> str:
    return " and ".join(name for kind, name in KINDS.items() if kind in encoders)


def needs_text(trainer: type[PretrainTrainer]) -> str:
    """What a method asks of the data, in words."""
    needs = trainer.task.info.needs
    words = [f"{needs.channels} or more channels"] if needs.channels > 1 else []
    if needs.images > 1:
        shared = {
            None: "any images",
            "modality": "cases of one modality",
            "session": "co-registered images of a session",
        }
        words.append(f"{needs.images} {shared[needs.same]} a sample")
    return "; ".join(filter(None, [", ".join(words) or "any volumes", trainer.task.info.needs_if]))


def _transfers(trainer: type[PretrainTrainer]) -> str:
    info = trainer.task.info
    if info.trains_decoder and "cnn" in info.encoders:
        return "the encoder; of a U-Net the decoder too, with `-transfer encoder_decoder`"
    return "the encoder"


def _memory(trainer: type[PretrainTrainer]) -> str:
    cost = trainer.cost
    words = [f"{cost.views:g} forward passes of a patch kept for the gradient"]
    if cost.tokens < 1:
        words.append(f"of {cost.tokens:.0%} of the tokens on a transformer")
    words.append("a teacher's copy of the weights" if cost.copies == 2 else "")
    words.append(f"{cost.copies} copies of the weights" if cost.copies > 2 else "")
    return ", ".join(filter(None, words)) + (", with the decoder" if cost.decoder else ", without the decoder")


def _own_settings(trainer: type[PretrainTrainer]) -> str:
    """The task's settings, and those of the recipe that differ from every trainer's."""
    from nnssl_ext.engine.task import PretrainTrainer

    kinds = [kind for kind in KINDS if kind in trainer.task.info.encoders]
    first = describe(trainer.configured([], kinds[0]))
    others = {row.name: row.default for row in describe(trainer.configured([], kinds[-1]))}
    base = {row.name: row.default for row in describe(PretrainTrainer())}
    rows = [
        dataclasses.replace(row, name=row.name.removeprefix("task_config."))
        for row in first
        if row.name.startswith("task_config.") or base.get(row.name) != row.default or others[row.name] != row.default
    ]
    differing = {row.name: others[row.name] for row in first if others.get(row.name) != row.default}
    return _settings(rows, differing)


def _settings(rows: Iterable[FieldDescription], on_transformer: Mapping[str, Any]) -> str:
    lines = []
    for row in rows:
        nested = isinstance(row.default, Mapping) and row.default
        default = f"those of {', '.join(row.default)}" if nested else f"`{row.default}`"
        if row.name in on_transformer:
            default += f"; transformer: `{on_transformer[row.name]}`"
        lines.append((f"`{row.name}`", default, " ".join(row.doc.split())))
    return _table(("setting", "default", "meaning"), lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"

    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)]) + "\n"


def _paragraphs(text: str | None) -> str:
    return inspect.cleandoc(text or "")
