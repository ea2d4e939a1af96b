"""Write the tables of README.md again, from results/."""

from pathlib import Path

from headwise.bench import table as performance
from headwise.recipes import table as lm

ROOT = Path(__file__).parents[1]
TABLES = {"lm": lm.markdown, "performance": performance.markdown}


def main() -> None:
    """Replace what stands between the marks of each table."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, markdown in TABLES.items():
        start, end = f"<!-- table:{name} -->\n", "<!-- /table -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        rows = lm.read_csv(ROOT / "results" / f"{name}.csv")
        text = f"{before}{start}{markdown(rows)}{end}{after}"
    readme.write_text(text)


if __name__ == "__main__":
    main()
