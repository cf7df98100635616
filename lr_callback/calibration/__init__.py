"""What some training batches show: how much each input and output of a layer counts."""
