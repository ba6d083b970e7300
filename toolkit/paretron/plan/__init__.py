"""From a recipe, a config and headers to a plan: shapes, costs, problems, and the stages to run."""
