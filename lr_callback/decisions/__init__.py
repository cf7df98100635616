"""Numbers only: costs, candidates, budgets, and the allocation that is chosen among them."""
