"""How likely a model finds it to end a thought or an answer: the probability of all tokens that do so, together.

Where the text does so, too little of it is a model that does not stop; elsewhere, too much is a model that stops too early. What
follows the last token of a document is another document, about which neither model can know, so it counts on neither side.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hf_quant.evaluation.metrics import BaseTokens


@dataclass(frozen=True)
class Ending:
    """One kind of ending; its methods are what `metrics.Metric` takes.

    Attributes:
        kind: Field of `BaseTokens` with the base's log-probabilities of its tokens.
    """

    kind: str

    def of_model(self, base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
        """The model's probability of it."""
        return log_q.gather(-1, self._ids(base)).exp().sum(-1)

    def of_base(self, base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
        """The base's probability of it."""
        probability: Tensor = getattr(base, self.kind).exp().sum(-1)
        return probability

    def change(self, base: BaseTokens, log_q: Tensor, target: Tensor) -> Tensor:
        """The model's probability minus the base's."""
        return self.of_model(base, log_q, target) - self.of_base(base, log_q, target)

    def comes(self, base: BaseTokens, target: Tensor, inside: Tensor) -> Tensor:
        """Where the text has one of its tokens next."""
        return inside & (self._ids(base) == target[:, None]).any(-1)

    def elsewhere(self, base: BaseTokens, target: Tensor, inside: Tensor) -> Tensor:
        """Where the document goes on with another token; nowhere in a text without such tokens."""
        return inside & (self._ids(base) != target[:, None]).all(-1) & bool(self._ids(base).shape[-1])

    def _ids(self, base: BaseTokens) -> Tensor:
        ids: Tensor = getattr(base, f"{self.kind}_ids")
        return ids


ANSWER, THOUGHT = Ending("stop"), Ending("end_of_thought")
