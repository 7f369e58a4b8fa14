"""A folder served by several ranks: ``python ranks.py FOLDER SIZE LENGTH < PROMPTS``, both sides lists of ids in JSON."""

from __future__ import annotations

import json
import sys


def main() -> None:
    """Print the greedy continuations in a line of their own."""
    from vllm import LLM, SamplingParams

    host = LLM(
        model=sys.argv[1], tensor_parallel_size=int(sys.argv[2]), distributed_executor_backend="mp", dtype="float32",
        max_model_len=128, enforce_eager=True, max_num_seqs=8, max_num_batched_tokens=256,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in json.load(sys.stdin)]
    made = host.generate(prompts, sampling, use_tqdm=False)
    sys.stdout.write("\n" + json.dumps([list(one.outputs[0].token_ids) for one in made]) + "\n")


if __name__ == "__main__":  # each rank is a process that imports this file
    main()
