"""``python -m hf_quant.cli``."""

from hf_quant.cli import main

main()
