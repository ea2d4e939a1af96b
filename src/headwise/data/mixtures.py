"""The papers' mixtures of text, from datasets that the Hub still has as plain files."""

import json
from pathlib import Path

from headwise.data.sources import Source, check_names
from headwise.errors import reading

MOH_LLM = (
    Source("emozilla/dolma-v1_7-305B", weight=61.28, domain="Dolma"),
    Source("monology/pile-uncopyrighted", weight=12.48, domain="Pile"),
    Source("allenai/c4", "en", weight=10.94, domain="C4"),
    Source("common-pile/arxiv_papers_filtered", weight=4.37, domain="ArXiv"),
    Source("common-pile/pre_1929_books_filtered", weight=4.24, domain="Books"),
    Source("wikimedia/wikipedia", "20231101.en", weight=3.50, domain="Wikipedia"),
    Source("common-pile/stackexchange_filtered", weight=3.19, domain="StackExchange"),
)
"""What MoH-LLM was trained on, in percent of the tokens.

**Source.** Jin et al., *MoH*, arXiv 2410.11842: RedPajama's Books 4.24, Wikipedia 3.50, ArXiv 4.37,
StackExchange 3.19 and C4 10.94; Dolma 61.28; Pile 12.48.

**Deviates.** `datasets` runs no repository's script any more, and the Books of RedPajama and of the
Pile were withdrawn. There stand in: for Dolma its version 1.7, a sample of 305 billion tokens, as
the paper names no version; for the Pile its subsets without a claim of copyright; for RedPajama's
C4 the C4 that it was taken from; for its Wikipedia, of twenty languages, the English one of
November 2023; for its ArXiv, StackExchange and Books the Common Pile's, with open licences, the
Books being from before 1929.
"""

RED_PAJAMA = (
    Source("HuggingFaceFW/fineweb", "sample-350BT", weight=878, domain="CommonCrawl"),
    Source("allenai/c4", "en", weight=175, domain="C4"),
    Source("common-pile/stackv2_edu_filtered", weight=59, domain="GitHub"),
    Source("common-pile/arxiv_papers_filtered", weight=28, domain="ArXiv"),
    Source("common-pile/pre_1929_books_filtered", weight=26, domain="Books"),
    Source("wikimedia/wikipedia", "20231101.en", weight=24, domain="Wikipedia"),
    Source("common-pile/stackexchange_filtered", weight=20, domain="StackExchange"),
)
"""What MH-MoE's decoders were trained on: RedPajama, in billions of tokens.

**Source.** Huang et al., *MH-MoE*, arXiv 2411.16205, trains on RedPajama and names no shares; the
shares are those that RedPajama-Data-1T publishes of itself, 1,210 billion in all.

**Deviates.** RedPajama's repository is a script, which `datasets` no longer runs. There stand in:
for CommonCrawl a sample of FineWeb, which was filtered otherwise; for GitHub the educational part
of the Stack v2; the others as in `MOH_LLM`. What is nearest to the original as a whole is
`Source("cerebras/SlimPajama-627B")`: RedPajama without duplicates, as one source whose parts have
the shares that were left of them.
"""

MIXTURES = {"moh-llm": MOH_LLM, "red-pajama": RED_PAJAMA}
SUFFIX = ".mixture.json"


def find_mixture(data: str | None) -> tuple[Source, ...] | None:
    """The mixture of that name, or in that file; None where data is neither.

    Args:
        data: A name in `MIXTURES`, or a file whose name ends in .mixture.json: a list of objects
            with the fields of `Source`.

    Raises:
        ValueError: If the file cannot be read as that.
    """
    if data is None or not data.endswith(SUFFIX):
        return MIXTURES.get(data or "")
    with reading(data, "a list of sources"):
        sources = tuple(Source(**fields) for fields in json.loads(Path(data).read_text()))
        check_names(sources)
    return sources
