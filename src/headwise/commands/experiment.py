"""`headwise experiment`: a study of the papers, at a scale."""

from headwise.ops.choice import look_up
from headwise.parsing import first_field, parsed
from headwise.recipes import train
from headwise.recipes.scales import SCALES
from headwise.recipes.studies import STUDIES


def main(argv: list[str]) -> None:
    """Run the command."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: headwise experiment NAME [--scale SCALE] [OPTIONS]\n")
        for name, study in STUDIES.items():
            print(f"  {name:21}{study.question}")
        print()
        for scale, make in SCALES.items():
            print(f"  --scale {scale:13}{(make.__doc__ or '').splitlines()[0]}")
        print("\nheadwise experiment NAME --help lists the fields of a study.")
        return
    name, *fields = argv
    look_up("study", name, STUDIES)
    scale, fields = first_field("scale", "tiny", fields)
    default = look_up("scale", scale, SCALES)(name)
    train(parsed(type(default), fields, f"headwise experiment {name}", default))
