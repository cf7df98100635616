"""Host: what a compression asks of a running Trainer, and what follows it there."""
