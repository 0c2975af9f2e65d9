"""The three fused operations of a step.

pack                  gathers sampled rows into slots; host arrays to the device
adamw                 moves sampled rows of weights and moments in one pass
linear_cross_entropy  the LM head and its loss, without the full logits
triton_kernels        all three for a GPU
dispatch              which version a model uses
"""
