"""What is done about a cut without training: a refit, biases, BatchNorm statistics."""
