"""What a base's licence requires of a quantized copy: our reading of the texts, not legal advice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# values that the Hub accepts for ``license``
# https://huggingface.co/docs/hub/repositories-licenses
KNOWN = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "grok2-community",
        "gemma",
        "unknown",
        "other",
    ]
)
_NO_DERIVATIVES = re.compile(r"(^|[-_ ])nd([-_ ]|$)|no[-_ ]?deriv", re.IGNORECASE)
_LLAMA = re.compile(r"llama[-_ ]?(\d(?:\.\d)?)")


def why_not(source: Mapping[str, Any], repo_id: str) -> str | None:
    """Why a quantized copy may not be published as ``repo_id``; None if it may.

    Args:
        source: From recipe.json, with the licence fields of the base's card.
        repo_id: ``owner/name``.
    """
    base, licence = source.get("model", "the base"), source.get("license")
    if not is_stated(source):
        return f"the licence of {base} is not known, so a copy of it may not be published; name it with --license (in Python: license=)"
    if licence not in KNOWN:
        return (
            f"the Hub knows no licence {licence!r}; use other, with license_name and license_link in the base's card"
        )
    if licence == "other" and not source.get("license_name"):
        return (
            f"the licence of {base} is other, without a license_name that says which: it stands in the card of the base, "
            "beside license_link"
        )
    name = _name(source)
    if _NO_DERIVATIVES.search(name):
        return f"{base} is under {name}, which forbids derivatives, and quantized weights are one"
    if _wants_llama(name) and not repo_id.rpartition("/")[2].lower().startswith("llama"):
        return f"{base} is under {name}, which wants the name of a derivative to begin with Llama: not {repo_id}"
    return None


def is_stated(source: Mapping[str, Any]) -> bool:
    """Whether the base's card names one licence."""
    return isinstance(source.get("license"), str) and source["license"] != "unknown"


def notice(source: Mapping[str, Any]) -> str | None:
    """A line that the licence requires in a file called NOTICE, or None."""
    name = _name(source)
    if match := _LLAMA.match(name):
        family = "LLAMA" if match[1] == "2" else "Llama"
        return (
            f"Llama {match[1]} is licensed under the {family} {match[1]} Community License, "
            "Copyright (c) Meta Platforms, Inc. All Rights Reserved."
        )
    if name.startswith("gemma"):
        return "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"
    return None


def attribution(source: Mapping[str, Any]) -> str | None:
    """Words that the licence requires to be displayed, or None."""
    return "Built with Llama" if _wants_llama(_name(source)) else None


def _name(source: Mapping[str, Any]) -> str:
    identifier = str(source.get("license") or "")
    return str(source.get("license_name") or identifier).lower() if identifier == "other" else identifier


def _wants_llama(name: str) -> bool:
    """Llama licences from version 3 on."""
    match = _LLAMA.match(name)
    return match is not None and match[1] != "2"
