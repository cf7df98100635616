"""Units of cost that have to be measured, or that the user brings."""
