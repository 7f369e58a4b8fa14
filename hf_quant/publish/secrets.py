"""Patterns of secrets: those of this package, and those of detect-secrets if it is installed.

The patterns of this package apply everywhere; ``hf-quant[publish]`` adds the services that only detect-secrets knows. A pattern
begins with fixed letters or with a boundary, so that neither words of a vocabulary nor long base64 texts match by chance.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

SHORTEST = 8  # characters of a string that could be private
# detectors of detect-secrets that guess: any assignment to a word like "token", any address, any capitalized word
GUESSING = {"KeywordDetector", "IPPublicDetector", "ArtifactoryDetector"}
AROUND = 80  # characters before a long word that can identify it, such as the name that it is assigned to
_LONG = re.compile(r"(?=[A-Za-z_/+=.:-]{0,40}\d)[A-Za-z0-9_/+=.:-]{20,}")
_WORD = r"(?<![A-Za-z0-9+/])"  # a boundary that does not occur within base64


@dataclass(frozen=True)
class Rule:
    """One kind of secret.

    Attributes:
        kind: Its name in a refusal.
        hints: A text without any of these words, in lower case, has no match; this test is much faster.
        pattern: Matches it.
        name: Must come before it, for values that only their name makes secret; these must look random too.
    """

    kind: str
    hints: tuple[str, ...]
    pattern: re.Pattern[str]
    name: re.Pattern[str] | None = None

    def finds(self, text: str, lower: str) -> bool:
        """Whether ``text`` contains one; ``lower`` is ``text`` in lower case."""
        if not any(hint in lower for hint in self.hints):
            return False
        if self.name is None:
            return self.pattern.search(text) is not None
        return any(
            _looks_random(match[1]) and self.name.search(text[max(match.start() - AROUND, 0) : match.start()])
            for match in self.pattern.finditer(text)
        )


def _rule(kind: str, hints: str, pattern: str, name: str | None = None) -> Rule:
    named = None if name is None else re.compile(name, re.IGNORECASE)
    return Rule(kind, tuple(hints.split()), re.compile(pattern), named)


_NAMES = (
    r"(?:api[_-]?key|secret|secret[_-]?(?:access[_-]?)?key|access[_-]?key|private[_-]?key|passwd|password|credentials?"
    r"|(?:auth|access|refresh|hub|api|bearer)[_-]?token)"
)
RULES = (
    _rule("a Hugging Face token", "hf_ api_org_", r"(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    _rule("an API key", "sk-", r"(?<![a-z])sk-[A-Za-z0-9_-]{20,}"),  # "task-specific-..." is a word
    _rule("an API key", "gsk_ xai- nvapi- pplx- r8_", r"(?:gsk_|xai-|nvapi-|pplx-|r8_)[A-Za-z0-9_-]{35,}"),
    _rule("an AWS key", "akia asia abia acca", rf"{_WORD}(?:AKIA|ASIA|ABIA|ACCA)[0-9A-Z]{{16}}(?![0-9A-Za-z])"),
    _rule("a GitHub token", "ghp_ gho_ ghu_ ghs_ ghr_ github_pat_", r"gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22}"),
    _rule("a GitLab token", "gl", r"gl(?:pat|dt|ft|soat|rt|cbt|imt|ptt|agent|oas)-[A-Za-z0-9_-]{20,}"),
    _rule("a Google key", "aiza ya29.", rf"{_WORD}(?:AIza[A-Za-z0-9_-]{{35}}(?![A-Za-z0-9_-])|ya29\.[A-Za-z0-9_-]{{20,}})"),
    _rule("a Slack token", "xox xapp- hooks.slack", r"xox[a-z]-[A-Za-z0-9-]{10,}|xapp-\d-[A-Za-z0-9-]{10,}|hooks\.slack\.com/services/T\w+/B\w+/\w+"),
    _rule("an npm token", "npm_ _authtoken", r"npm_[A-Za-z0-9]{36}|:_authToken=\S{20,}"),
    _rule("a PyPI token", "pypi-", r"pypi-[A-Za-z0-9_-]{50,}"),
    _rule("a Stripe key", "k_live_ k_test_", r"[rs]k_(?:live|test)_[A-Za-z0-9]{20,}"),
    _rule("a SendGrid key", "sg.", rf"{_WORD}SG\.[A-Za-z0-9_-]{{16,}}\.[A-Za-z0-9_-]{{30,}}"),
    _rule("a DigitalOcean token", "_v1_", r"do[opr]_v1_[0-9a-f]{64}"),
    _rule("a Databricks token", "dapi", r"dapi[0-9a-f]{32}"),
    _rule("an Azure key", "accountkey= sharedaccesskey=", r"(?:AccountKey|SharedAccessKey)=[A-Za-z0-9+/]{40,}=*"),
    _rule("a Telegram token", ":aa", r"(?<![\w.])\d{8,10}:AA[A-Za-z0-9_-]{32,33}(?![A-Za-z0-9_-])"),
    _rule("a JSON web token", "eyj", r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"),
    _rule("a private key", "private putty-user-key-file- age-secret-key-",
          r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY|PuTTY-User-Key-File-\d|AGE-SECRET-KEY-1[0-9A-Z]{50,}"),
    _rule("a password in an address", "://", r"://[^\s/:@\"'<>{}]+:[^\s/@\"'<>{}]{3,}@[\w.-]"),
    _rule("a login", "login", r"machine\s+\S+\s+login\s+\S+\s+password\s+\S+"),
    _rule("a password or key", "key secret passw credential token",
          r"[:=]\s*[\"']?([A-Za-z0-9+/_.~!@#$%^&*-]{16,})", rf"(?:(?<![A-Za-z])|_){_NAMES}[\"']?\s*$"),
    _rule("somebody's home directory", "/home/ /users/ /root/ users",
          r"(?<![\w.])(?:/home/|/Users/|/root/)[\w.-]+|(?<![A-Za-z])[A-Za-z]:[\\/]+[Uu][Ss][Ee][Rr][Ss][\\/]+[\w.-]+"),
)  # fmt: skip


def secret_in(text: str) -> str | None:
    """The kind of secret in ``text``, or None."""
    lower = text.lower()
    for rule in RULES:
        if rule.finds(text, lower):
            return rule.kind
    if detectors := _detectors():
        for match in _LONG.finditer(text):  # all patterns over a whole vocabulary would take minutes
            around = text[max(match.start() - AROUND, 0) : match.end() + AROUND]
            for kind, analyze in detectors:
                if any(True for line in around.splitlines() for _ in analyze(line)):
                    return f"what looks like a secret ({kind})"
    return None


def library() -> str | None:
    """How to search for secrets of more services; None if detect-secrets is installed."""
    return None if _detectors() else "pip install 'hf-quant[publish]' finds the keys of more services"


@lru_cache(maxsize=1)
def _detectors() -> tuple[tuple[str, Callable[[str], Iterator[str]]], ...]:
    """Name and function of each detector of detect-secrets that is exact enough; none if it is not installed."""
    try:
        from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
        from detect_secrets.plugins.base import RegexBasedDetector
    except ImportError:
        return ()
    plugins: dict[str, Any] = get_mapping_from_secret_type_to_class()
    return tuple(
        (kind, plugin().analyze_string)
        for kind, plugin in sorted(plugins.items())
        if issubclass(plugin, RegexBasedDetector) and plugin.__name__ not in GUESSING
    )


def _looks_random(value: str) -> bool:
    """Whether a value could be a password or key, and is neither a word nor a placeholder such as YOUR_API_KEY."""
    if not (any(c.isdigit() for c in value) and any(c.isalpha() for c in value)):
        return False
    shares = [count / len(value) for count in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares) > 3.0
