"""From a budget to a plan: measured sensitivity of each layer and block, and the cheapest choice within the budget."""
