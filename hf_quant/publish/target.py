"""Where a folder is uploaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """Where to upload a folder.

    Attributes:
        repo_id: ``owner/name``.
        private: Visibility of the repository afterwards; None leaves an existing one as it is, and makes a new one private.
        gated: Whether readers have to ask for access; None leaves it as it is.
        create_pr: Open a pull request; the settings of the repository stay as they are.
        revision: Branch, which is created if necessary, or ``refs/pr/N``.
        tag: Tag for the commit.
        message: Message of the commit, and title of the pull request.
    """

    repo_id: str
    private: bool | None = None
    gated: Literal["auto", "manual", False] | None = None
    create_pr: bool = False
    revision: str | None = None
    tag: str | None = None
    message: str = "Upload with hf-quant"

    @property
    def is_pull_request(self) -> bool:
        """Whether it goes to a pull request; the repository may be another user's, so its settings stay as they are."""
        return self.create_pr or (self.revision or "").startswith("refs/pr/")

    def contradiction(self, gated: str) -> str | None:
        """Why these options do not go together; None if they do.

        Args:
            gated: As it was asked for, ``inherit`` if it was not.
        """
        changes = self.private is not None or gated != "inherit"
        if self.create_pr and (self.revision or self.tag or changes):
            return "a pull request changes no settings, branches or tags: --create-pr goes alone"
        if self.is_pull_request and changes:
            return "a pull request changes no settings: leave out private, public and gated"
        return None
