"""The zoo: every model of torchvision and many of timm and transformers, cut in half and looked at from all sides.

    python -m benchmarks.zoo --shard 1/4     # `make zoo` runs all of it
    python -m benchmarks.zoo.speed           # seconds to analyse, beside one forward-backward pass

Models have random weights, and the inputs are small: nothing is downloaded.
"""
