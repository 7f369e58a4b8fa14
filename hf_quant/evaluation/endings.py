"""Which tokens end a thought or an answer, as the files of a model say; its name says nothing here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig

from hf_quant.data.text import Windows
from hf_quant.errors import CheckpointError, printable
from hf_quant.evaluation.samples import Samples
from hf_quant.hf.auto import config_of, vocabulary_of

END_OF_THOUGHT = (  # added tokens of the tokenizers of models that think
    "</think>",  # DeepSeek, Qwen, GLM, ERNIE, MiniMax, Phi, SmolLM and most others
    "</thinking>",
    "</thought>",  # EXAONE
    "</seed:think>",  # Seed
    "[/THINK]",  # Mistral
    "<|END_THINKING|>",  # Cohere
    "<|end_of_thought|>",
    "<channel|>",  # Gemma
    "\u25c1/think\u25b7",  # Kimi
)


@dataclass(frozen=True)
class Endings:
    """Ids of tokens that end something, in ascending order.

    Attributes:
        stop: That end an answer: generation stops after them.
        end_of_thought: That end a thought, after which the answer begins.
    """

    stop: tuple[int, ...] = ()
    end_of_thought: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: str, tokenizer: Any, **hub: Any) -> Endings:
        """Those of a model: what its configurations and its tokenizer call EOS, and the added tokens in `END_OF_THOUGHT`.

        Args:
            model: Folder or Hub id.
            tokenizer: Of the model.
            hub: As `hf.auto.hub_options`.
        """
        config = config_of(model, **hub)
        added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
        sources = (_generation_config(model, hub), config, config.get_text_config(), tokenizer)
        stop = [number for source in sources for number in _listed(getattr(source, "eos_token_id", None))]
        vocabulary = vocabulary_of(config)
        return cls(_ids(stop, vocabulary), _ids([added[word] for word in END_OF_THOUGHT if word in added], vocabulary))

    def in_text(self, windows: Windows | Samples) -> Endings:
        """Only the kinds of which a token is to be predicted somewhere in the text."""
        kinds = {field.name: getattr(self, field.name) for field in fields(self)}
        return Endings(
            **{kind: ids for kind, ids in kinds.items() if torch.isin(windows.continued, torch.tensor(ids)).any()}
        )


NO_ENDINGS = Endings()


def _generation_config(model: str, hub: dict[str, Any]) -> GenerationConfig | None:
    options = {name: value for name, value in hub.items() if name not in ("trust_remote_code", "code_revision")}
    try:
        return GenerationConfig.from_pretrained(model, **options)
    except OSError:  # not every model has one
        return None
    except Exception as error:  # transformers checks its fields by using them
        raise CheckpointError(f"{model}: generation_config.json: {printable(str(error))}") from error


def _listed(ids: Any) -> list[Any]:
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def _ids(ids: Iterable[Any], vocabulary: int) -> tuple[int, ...]:
    return tuple(sorted({i for i in ids if isinstance(i, int) and 0 <= i < vocabulary}))
