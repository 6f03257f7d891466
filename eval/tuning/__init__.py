"""From a budget to a plan: what each layer and block bears, measured, and the cheapest choice within a budget."""
