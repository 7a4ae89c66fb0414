"""How a model is spread: layouts, schedules, costs and the search over them. Nothing here imports torch."""
