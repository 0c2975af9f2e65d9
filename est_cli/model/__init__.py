"""One decoder class (GPT-2 and Llama are settings of it), its initialisation and its Hugging Face names."""
