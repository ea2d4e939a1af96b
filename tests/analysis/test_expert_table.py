from dataclasses import replace

from headwise.analysis.records import ExpertLoads
from headwise.analysis.tables import expert_table


def test_table_is_a_mean_over_layers_and_domains_and_the_spread_over_seeds(record):
    moe = record.models[3]
    alike = {"code": [[0.0, 0, 0, 1, 0]], "prose": [[0.0, 0, 0, 1, 0]]}
    other = replace(moe, seed=1, experts=replace(moe.experts, by_domain=alike))
    table = expert_table(replace(record, models=[record.models[0], moe, other]))
    (row,) = table.printed()
    cells = dict(zip(table.columns[:6], row[:6], strict=True))
    # 40 % of the experts and 20 %, whichever they are, each with half or all of the work; 1/4
    # and 3/4 in common in both runs.
    assert cells == {
        "model": "MoE",
        "experts": "5",
        "used (%)": "30.0 ± 14.1",
        "effective (%)": "30.0 ± 14.1",
        "busiest (%)": "75.0 ± 35.4",
        "overlap (%)": "50.0",
    }


def test_what_is_undefined_has_no_number(record):
    moe = record.models[3]
    (load, *_) = moe.experts.by_domain.values()
    whole = ExpertLoads([1], {"code": load}, 1, {"code": [24]}, {"code": [None]})
    (row,) = expert_table(replace(record, models=[replace(moe, experts=whole)])).printed()
    assert row[5:] == ["–"] * 4
