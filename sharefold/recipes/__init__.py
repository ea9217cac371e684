"""Recipes: published systems as plan builders that apply to any network of the right shape."""

from sharefold.recipes.builders import Recipe
from sharefold.recipes.catalog import RECIPES, build_plan, parse_recipe, recipe_named

__all__ = ["RECIPES", "Recipe", "build_plan", "parse_recipe", "recipe_named"]
