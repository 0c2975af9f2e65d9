"""One decoder class (GPT-2 and Llama are settings of it) with its initial weights, and its Hugging Face names."""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
