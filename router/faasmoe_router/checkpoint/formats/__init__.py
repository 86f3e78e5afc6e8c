"""Checkpoints as they are published quantised: codes and scales to weights.

A method of quantisation (`quantization_config.quant_method`) has a function here that finds the
codes and scales among a checkpoint's tensors. `methods.dequantized_tensors` puts in their place
tensors that are dequantised when they are read, under the names that checkpoints without
quantisation have, so that the conversion to the model's parameters is the same for all. Knows
nothing of models.
"""
