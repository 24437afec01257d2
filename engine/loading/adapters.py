"""An entry's adapters, from their files to a tested model: merged into the weights, or computed beside them.

Beside the weights they need what only the packed runner on a CPU in float32 has: layers whose rows are independent.
There each adapter is tested as the model is: against plain transformers with the same adapter, and bits alone against
bits among rows of the model and of other adapters, in chunks and on one thread. What fails is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import nn

from engine.adapters.layers import Places, attach, computed_plainly, places_of
from engine.adapters.merging import merge
from engine.adapters.weights import Adapter, AdapterFiles
from engine.checkpoints.checkpoint import Checkpoint
from engine.compute.backend import Backend, Progress
from engine.config import ModelConfig
from engine.errors import LoadError
from engine.loading.manifest import hash_files
from engine.loading.placement import Placement
from engine.loading.selftest import Reference, SelfTest
from engine.loading.trials.trial_runs import Packed, Run, Text, equal, on_one_thread
from engine.types.model_info import ReproducibilityReport

__all__ = ["EntryAdapters", "ReadyAdapter"]

_REASON: Final = "the same bits alone, beside the model and other adapters, chunked and on one thread"
_MERGE: Final = "give it an entry of its own with merge: true"


@dataclass(frozen=True, slots=True)
class ReadyAdapter:
    """An adapter that is merged, or attached and tested.

    Attributes:
        digests: SHA-256 of its files.
        law: what its own test found; None if it is merged: then the model's test is its own.
    """

    files: AdapterFiles
    adapter: Adapter
    digests: Mapping[Path, str]
    law: ReproducibilityReport | None

    @property
    def name(self) -> str:
        return self.files.entry.name


class EntryAdapters:
    """The adapters of one entry. Its methods are called in the order in which they stand here."""

    def __init__(self, config: ModelConfig, files: Sequence[AdapterFiles]) -> None:
        self._config = config
        self._files = tuple(files)
        self._merged = config.merged_adapter is not None
        self._loaded: tuple[Adapter, ...] = ()
        self._places: Places = {}
        self._references: dict[str, Reference] = {}
        self._reports: dict[str, ReproducibilityReport] = {}

    @classmethod
    def inspect(cls, config: ModelConfig, found: Checkpoint, placement: Placement) -> EntryAdapters:
        """Check the files, before a weight of the model is read.

        Raises:
            LoadError: a file is damaged, or the adapter cannot be computed on this device.
        """
        for entry in config.adapters:
            where = f"{config.id}: adapters.{entry.name}"
            if found.config.get("quantization_config") is not None:
                raise LoadError(f"{where}: the checkpoint is quantised, and an adapter needs the weights as numbers.")
            if not entry.merge and not placement.has_kernels:
                dtype = str(placement.dtype).removeprefix("torch.")
                raise LoadError(
                    f"{where}: beside the model, adapters are computed on a CPU in float32, not on {placement.device} "
                    f"in {dtype}; {_MERGE}."
                )
        return cls(config, [AdapterFiles.inspect(entry, config.id) for entry in config.adapters])

    def join(self, model: nn.Module) -> None:
        """Read the tensors for the plain model; merge them, or find the layers beside which they are computed.

        Raises:
            LoadError: an adapter is another model's, damaged, or cannot be computed so.
        """
        self._loaded = tuple(files.load(model) for files in self._files)
        if self._merged:
            merge(model, self._loaded[0], self._files[0].where)
        else:
            self._places = places_of(model, self._loaded, self._config.id)

    def compare(self, model: nn.Module, vocab_size: int, length: int, say: Progress) -> None:
        """Compute what plain transformers answers with each adapter, to compare with. The model is still plain."""
        for adapter in () if self._merged else self._loaded:
            say(f"a pass of plain transformers with {adapter.name}")
            with computed_plainly(model, adapter, self._config.id):
                self._references[adapter.name] = Reference.of(model, vocab_size, length, adapter=adapter.name)

    def attach(
        self,
        model: nn.Module,
        backend: Backend,
        test: SelfTest,
        base: Reference,
        tolerance: float,
        vocab_size: int,
        length: int,
    ) -> SelfTest:
        """Put the adapters beside the model's layers, and test each. Returns the test of the model with them.

        Raises:
            LoadError: the law does not hold for the model, or for one of the adapters; or its numbers are wrong.
        """
        if not self._references:
            return test
        make = backend.exact_linear
        if test.layers is None or not test.report.holds or make is None:
            raise LoadError(
                f"{self._config.id}: adapters.{self._loaded[0].name}: beside this model no adapter is reproducible "
                f"({test.report.reason}); {_MERGE}."
            )
        attach(self._places, self._loaded, make, self._config.id)
        packed = Packed(
            model, backend, test.layers, vocab_size, length, row_safe=test.row_safe, skips_masks=test.skips_masks
        )
        trial = _Trial(packed, base, self._references)
        for name, reference in self._references.items():
            where = f"{self._config.id}: adapters.{name}"
            for runs in (trial.alone[name], trial.crowd(name)[: len(reference.texts)]):
                if difference := reference.difference(runs, tolerance):
                    raise LoadError(f"{where}: beside the model it {difference}.")
            checks = trial.checks(name)
            if wrong := [check for check, right in checks.items() if not right]:
                raise LoadError(f"{where}: beside the model bits differ: {', '.join(wrong)}; {_MERGE}.")
            self._reports[name] = ReproducibilityReport(True, _REASON, tuple(checks.items()))
        single = test.single_rows and all(trial.single_rows(name) for name in self._references)
        return dataclasses.replace(test, single_rows=single)

    def ready(self) -> tuple[ReadyAdapter, ...]:
        """Return the adapters as they are served."""
        return tuple(
            ReadyAdapter(files, adapter, hash_files(files.entry.files), self._reports.get(adapter.name))
            for files, adapter in zip(self._files, self._loaded, strict=True)
        )


class _Trial:
    """Compares the bits of texts with adapters under different circumstances."""

    def __init__(self, packed: Packed, base: Reference, references: Mapping[str, Reference]) -> None:
        self._packed, self._extent = packed, base.extent
        self._texts = {"": _short(base), **{name: reference.texts for name, reference in references.items()}}
        self.alone = {name: [packed.run([text])[0] for text in texts] for name, texts in self._texts.items()}
        self._crowds: dict[str, list[Run]] = {}

    def crowd(self, name: str) -> list[Run]:
        """Compute an adapter's texts beside some of the model's and of another adapter, in one step where they fit."""
        if name not in self._crowds:
            self._crowds[name] = self._packed.run(self._mixed(name)[0], far=True)
        return self._crowds[name]

    def checks(self, name: str) -> dict[str, bool]:
        """Return which trials found equal bits, by name."""
        texts, alone = self._mixed(name)

        def in_pieces() -> bool:
            return equal(alone, self._packed.run(texts, budget=self._extent.chunk, far=True))

        few = [n for n, text in enumerate(texts) if len(text.prompt) < self._extent.long]
        in_small = self._packed.run([texts[n] for n in few], budget=5)
        return {
            "packed": equal(alone, self.crowd(name)),
            "chunked": equal([alone[n] for n in few], in_small),
            "threads": on_one_thread(in_pieces),
        }

    def single_rows(self, name: str) -> bool:
        """Tell whether a row computed alone needs no padding."""
        runs = [self._packed.run([text], single_rows=True)[0] for text in self._texts[name][:2]]
        return equal(self.alone[name][:2], runs)

    def _mixed(self, name: str) -> tuple[list[Text], list[Run]]:
        """Return an adapter's texts and those of its neighbours, and what each gave alone."""
        other = next((one for one in self._texts if one not in ("", name)), None)
        texts, alone = list(self._texts[name]), list(self.alone[name])
        for neighbour in ("", *([other] if other else ())):
            texts += self._texts[neighbour][:2]
            alone += self.alone[neighbour][:2]
        return texts, alone


def _short(reference: Reference) -> tuple[Text, ...]:
    return tuple(text for text in reference.texts if len(text.prompt) < reference.extent.long)
