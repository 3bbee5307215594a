"""How a model is trained: the recipe, the step, the loop around it, and what it leaves on disk."""
