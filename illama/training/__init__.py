"""Recipes, schedules, the trainer and its processes."""
