"""`headwise train`: the models of a recipe, trained and compared."""

from headwise.parsing import parsed
from headwise.recipes import RECIPES, recipe_run, train


def main(argv: list[str]) -> None:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise train RECIPE [OPTIONS]\n")
        for name, recipe in RECIPES.items():
            print(f"  {name:14}{recipe.summary}")
        print("\nheadwise train RECIPE --help lists the fields of a recipe.")
        return
    name, *fields = argv
    train(parsed(recipe_run(name), fields, f"headwise train {name}"))
