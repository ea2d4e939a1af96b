"""`python -m headwise.lm_eval …` is the harness's own command, for which converted models load.

They load where headwise has been imported, and the harness imports no plugins. The same works under
`accelerate launch -m headwise.lm_eval …`.
"""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
