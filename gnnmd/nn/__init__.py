"""Mathematics of the networks: tensors in, tensors out; knows neither graphs nor ranks."""
