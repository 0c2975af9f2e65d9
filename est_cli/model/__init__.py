"""The decoder.

transformer  one class (GPT-2 and Llama are settings of it), and its initial weights
huggingface  the classes of Hugging Face, both ways: config.json and tensors
"""

from est_cli.lazy import on_demand

__getattr__ = on_demand(__name__)
