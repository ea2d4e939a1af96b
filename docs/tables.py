"""Write the tables of README.md again, from results/."""

from pathlib import Path

from headwise.recipes.table import markdown, read_csv

ROOT = Path(__file__).parents[1]
START, END = "<!-- table:lm -->\n", "<!-- /table -->"


def main() -> None:
    """Replace what stands between the marks."""
    rows = read_csv(ROOT / "results" / "lm.csv")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}{markdown(rows)}{END}{after}")


if __name__ == "__main__":
    main()
