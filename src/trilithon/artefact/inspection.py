"""What is in an artefact, without running any of it: no GPU and no TensorRT are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trilithon.artefact.files import files_of, states
from trilithon.artefact.loading import CLASSES
from trilithon.artefact.manifest import MANIFEST, read_manifest
from trilithon.report.report import Report
from trilithon.spec.codec import decode, readable_classes


def inspect(folder: str | Path) -> dict[str, Any]:
    """Plain data: what the manifest says, and how each file is found; every file is read.

    Raises:
        InputError: the folder is no artefact, or one of another format, or its manifest is damaged.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    files = [
        {
            "name": file.name,
            "file": manifest["files"][file.name]["file"],
            "bytes": file.size,
            "sha256": file.sha256,
            "state": state,
        }
        for file, state in states(files_of(folder, manifest), hashes=True)
    ]
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    guards = {a["text"]: a for site in manifest["proofs"] for a in site["assumptions"] if a["source"] in ("guard", "declared")}
    return {
        "folder": str(folder),
        "format": manifest["format"],
        "model": manifest["model"],
        "dtype": _dtype(manifest),
        "max_tokens": manifest["max_tokens"],
        "rows": manifest["cache"].get("max_batch"),
        "cache": manifest["cache"].get("refused"),
        "versions": manifest["versions"],
        "target": manifest["target"],
        "programs": [*manifest["engines"], *manifest["native"]],
        "verified": {name: None if x is None else _limits(x) for name, x in manifest["verified"].items()},
        "tuned": {gpu: len(settings) for gpu, settings in manifest["tuned"].items()},
        "guards": list(guards.values()),
        "proofs": manifest["proofs"],
        "files": files,
        "other_files": sorted(found - {file["file"] for file in files} - {MANIFEST}),
    }


def is_whole(found: dict[str, Any]) -> bool:
    """Is every file that `inspect` found as it was written?"""
    return all(file["state"] == "ok" for file in found["files"])


def as_text(found: dict[str, Any]) -> str:
    """What `inspect` found, for people, without the proofs."""
    model, target, rows = found["model"], found["target"], found["rows"]
    name = model["id"] or model["class"]
    source = ", ".join(x for x in (model["kind"], model["revision"]) if x)
    capacity = f"{found['max_tokens']} tokens" + (f" x {rows} rows, {found['dtype']}" if rows else ", no KV cache")
    held = {name: f"within {limit:.0e}" if limit else "not verified" for name, limit in found["verified"].items()}
    lines = [
        f"{name}  ({source}, {model['class'].rpartition('.')[2]})",
        f"  {'format':10}{found['format']}",
        f"  {'target':10}{target['backend']} on {target['gpu'] or target['device']}",
        f"  {'capacity':10}{capacity}",
        f"  {'versions':10}{', '.join(f'{package} {version}' for package, version in found['versions'].items())}",
        f"  {'verified':10}{', '.join(f'{name} {text}' for name, text in held.items())}",
        *(f"  {'tuned':10}{count} kernels on {gpu}" for gpu, count in found["tuned"].items()),
        *(f"  {'guard':10}{guard['text']}  [{guard['source']}]" for guard in found["guards"]),
        *(f"  {'file':10}{file['file']}  {file['bytes']} bytes  {file['state']}" for file in found["files"]),
        *(f"  {'other':10}{name}  no part of it" for name in found["other_files"]),
    ]
    return "\n".join(lines)


def saved_report(folder: str | Path) -> Report:
    """The report, as it was when the model was compiled.

    Raises:
        InputError: as `inspect` does.
    """
    report: Report = decode(read_manifest(Path(folder))["report"], readable_classes(*CLASSES))
    return report


def _dtype(manifest: dict[str, Any]) -> str | None:
    shapes = manifest["cache"].get("shapes")
    return shapes[0]["fields"]["dtype"]["dtype"] if shapes else None


def _limits(canary: dict[str, Any]) -> float:
    """The largest error that its outputs may have."""
    return max((float(x) for x in decode(canary["limits"], {})), default=0.0)
