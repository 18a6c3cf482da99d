"""Read an artefact: all is checked before any of it is used, and no code is in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trilithon.artefact import native, weights
from trilithon.artefact.canaries import check
from trilithon.artefact.engines import read_engines
from trilithon.artefact.environment import check_versions, device_for
from trilithon.artefact.files import File, check_files, files_of
from trilithon.artefact.manifest import AGAIN, MANIFEST, read_manifest
from trilithon.artefact.saving import CANARIES, LOADED, TOKENIZER, WEIGHTS
from trilithon.capture.generation import GenerationSettings
from trilithon.compiled import Compiled, Origin
from trilithon.errors import CannotCache, InputError, TrilithonError
from trilithon.lower.native.fused.ahead import import_beside
from trilithon.lower.native.fused.tune import keep
from trilithon.lower.native.prompt import Prompt
from trilithon.lower.native.step import NativeStep
from trilithon.options import Options
from trilithon.prove.verdict import Proof, Verdict
from trilithon.report.report import Report, SiteReport
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.runtime import program as runtime
from trilithon.runtime.assemble import assemble
from trilithon.runtime.canary import Canary
from trilithon.runtime.context import HeldContext
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.runtime.seq2seq import Seq2Seq
from trilithon.spec.codec import decode, readable_classes
from trilithon.stages import clocked, stage, verifying

CLASSES = (Report, SiteReport, Proof, Verdict, CacheShape, runtime.Expected, runtime.ExpectedAxis, Options)
TRIES = 5  # to read a folder that is being saved over
log = logging.getLogger(__name__)


def load(folder: str | Path, device: str | torch.device | None = None, *, verify: bool = True) -> Compiled:
    """What `Compiled.save` wrote, ready to run.

    Native programs are lowered again here, and held to what eager gave when the model was compiled. Engines run on a GPU
    of the kind that they were built for.

    Args:
        device: None = of the kind that it was compiled for.
        verify: read every file and compare its hash, and run the canaries; False = check sizes only, which takes no time.

    Returns:
        The model; its `start_up` is of loading it.

    Raises:
        InputError: there is no such folder, another version wrote it, a file is missing or not as it was written, or it
            cannot run here.
        VerificationFailed: a program does not give here what it gave where it was compiled.
    """
    folder = Path(folder)
    for _ in range(TRIES - 1):
        manifest = read_manifest(folder)
        try:
            return _load(folder, manifest, device, verify)
        except InputError:
            if read_manifest(folder) == manifest:
                raise
        # it was saved over in the meantime
    return _load(folder, read_manifest(folder), device, verify)


def is_artefact(folder: str | Path) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def tokenizer_folder(folder: str | Path) -> Path | None:
    """Where the tokenizer lies that was saved with a model; its files are checked.

    Raises:
        InputError: they are not as they were written, or there is no model.
    """
    files = files_of(Path(folder), read_manifest(Path(folder)))
    own = {name: file for name, file in files.items() if name.startswith(f"{TOKENIZER}/")}
    check_files(own, hashes=True)
    return next((file.path.parent for file in own.values()), None)


def _load(folder: Path, manifest: dict[str, Any], device: str | torch.device | None, verify: bool) -> Compiled:
    files = files_of(folder, manifest)
    try:
        with clocked() as stages:
            chosen = device_for(manifest["target"], device)
            if chosen.type == "cuda" and manifest["native"]:
                import_beside()
            check_versions(manifest["versions"], manifest["target"], chosen)
            with _checked(files, hashes=verify):
                made = _Reader(manifest, files, chosen).compiled(verify)
            made.report.seconds.update(stages.seconds)
            return made
    except TrilithonError:
        raise
    except Exception as error:  # of data that is as it was written, and yet nothing that this version writes
        raise InputError(f"cannot read {folder}", why=f"{type(error).__name__}: {error}", todo=AGAIN) from error


@contextmanager
def _checked(files: Mapping[str, File], hashes: bool) -> Iterator[None]:
    """All files are checked before anything is done inside, but for the hash of the weights, which takes as long as all else:
    it is computed beside, and what is made inside is given to nobody before.
    """
    with stage("load"):
        check_files({WEIGHTS: files[WEIGHTS]}, hashes=False)
        check_files({name: file for name, file in files.items() if name != WEIGHTS}, hashes)
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(check_files, {WEIGHTS: files[WEIGHTS]}, hashes)
        try:
            yield
        finally:
            with stage("load"):
                whole.result()


@dataclass
class _Reader:
    """Makes a model of files that were checked."""

    manifest: Mapping[str, Any]
    files: Mapping[str, File]
    device: torch.device

    def __post_init__(self) -> None:
        self.classes = readable_classes(*CLASSES)
        self.options: Options = decode(self.manifest["options"], self.classes)
        self.backend: str = self.manifest["target"]["backend"]

    def compiled(self, verify: bool) -> Compiled:
        data = self.manifest
        self._keep_settings()
        with stage("load"):
            kept = weights.read(self.files[WEIGHTS].path, self.device)
            self.engines = read_engines(data, self.files, kept)
            self.blueprints = {
                name: native.read_blueprint(self.files[file].path, kept) for name, file in data["native"].items()
            }
        with stage("build"):
            programs = [self._program(p) for p in data["programs"]]
            decoder = self._decoder()
        origin = Origin(data["model"], self.backend, self.options, data["versions"], data["tuned"])
        self._canaries(programs, decoder)
        with verifying():
            found = self._check(programs, decoder) if verify else ""
        return Compiled(
            programs={p.inputs: p for p in programs},
            report=self._report(decoder, found),
            build=None,
            decoder=decoder,
            max_tokens=data["max_tokens"],
            defaults=data["defaults"],
            seq2seq=self._seq2seq(),
            origin=origin,
        )

    def _keep_settings(self) -> None:
        gpu = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        keep(self.manifest["tuned"].get(gpu, {}))

    def _lowered(self, name: str) -> Any:
        if name in self.engines:
            return self.engines[name]
        return native.lower_again(self.blueprints[name], self.backend, self.options, self.device)

    def _program(self, data: Mapping[str, Any]) -> runtime.Program:
        general = None if data["general"] is None else native.as_captured(self.blueprints[data["general"]], self.device)
        return runtime.Program(
            expected=decode(data["expected"], self.classes),
            fast=self._lowered(data["fast"]),
            general=general,
            guards=decode(data["guards"], self.classes),
            when_guard_fails=data["when_guard_fails"],
            blueprint=self.blueprints.get(data["fast"]),
        )

    def _decoder(self) -> CachedDecoder | CannotCache:
        cache = self.manifest["cache"]
        if "refused" in cache:
            refused = cache["refused"]
            return CannotCache(refused["what"], why=refused["why"], todo=refused["todo"])
        context = None
        if cache["context"] is not None:
            inputs, has_rows = cache["context"]["inputs"], cache["context"]["has_rows"]
            context = HeldContext(self._lowered("context"), tuple(inputs), tuple(has_rows))
        modules = CachedModules(**{name: self._lowered(name) for name in cache["modules"]})
        shapes, options = list(decode(cache["shapes"], self.classes)), replace(self.options, max_batch=cache["max_batch"])
        most = self.manifest["max_tokens"]
        own = {name: self.blueprints[name] for name in (*cache["modules"], "context") if name in self.blueprints}
        return assemble(modules, shapes, most, options, self.device, cache["first_tokens"], context, own)

    def _seq2seq(self) -> Seq2Seq | None:
        data = self.manifest["cache"].get("seq2seq")
        if data is None:
            return None
        settings = GenerationSettings(**data["settings"])
        return Seq2Seq(decode(data["expected"], self.classes), decode(data["guards"], self.classes), settings)

    def _canaries(self, programs: list[runtime.Program], decoder: CachedDecoder | CannotCache) -> None:
        """Give each program what it is held to."""
        held = weights.read(self.files[CANARIES].path, torch.device("cpu"))

        def canary(name: str) -> Canary | None:
            data = self.manifest["verified"][name]
            if data is None:
                return None
            given = {own: held[key] for own, key in data["given"].items()}
            return Canary(given, tuple(held[key] for key in data["wanted"]), decode(data["limits"], {}))

        for program, data in zip(programs, self.manifest["programs"], strict=True):
            found = canary(data["fast"])
            program.canaries = [] if found is None else [found]
        if isinstance(decoder, CachedDecoder):
            decoder.canary = canary("decoder")

    def _check(self, programs: list[runtime.Program], decoder: CachedDecoder | CannotCache) -> str:
        """Hold the programs to their canaries; what was found, in words."""
        if self.engines and self.device.type != "cuda":
            return "the engines were not run"
        errors = check(programs, decoder, self.device)
        return f"their relative error here is {max(errors):.1e}" if errors else ""

    def _report(self, decoder: CachedDecoder | CannotCache, found: str) -> Report:
        """As it was saved, with what is so here: by what prompts and steps run, and how they were verified."""
        report: Report = decode(self.manifest["report"], self.classes)
        notes, versions = report.notes, self.manifest["versions"]
        if isinstance(decoder, CachedDecoder):
            programs = (decoder.modules.prefill, decoder.modules.decode)
            own = {x.note.partition(":")[0]: x.note for x in programs if isinstance(x, (Prompt, NativeStep))}
            others = () if self.engines else ("prefill", "decode")
            notes = (*(note for note in notes if note.partition(":")[0] not in others), *own.values())
        where = ", ".join(f"{name} {versions.get(name)}" for name in ("trilithon", "torch", "transformers"))
        verified = "verified against eager" if any(self.manifest["verified"].values()) else "not verified"
        said = f"{LOADED}its programs were {verified} when they were compiled ({where})" + (f"; {found}" if found else "")
        return replace(report, sites=list(report.sites), notes=(*notes, said), seconds={})
