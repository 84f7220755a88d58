"""Published data sets → records.  One module per data set; each reader yields records and counts what it drops."""

READERS = {
    "own": "..load:read_own",
    "refer": ".refer:read_refer",
    "refcoco-parquet": ".refcoco_parquet:read_refcoco_parquet",
    "grefcoco": ".grefcoco:read_grefcoco",
    "llava": ".llava:read_llava",
    "llava-parquet": ".llava:read_llava_parquet",
    "grandf": ".grandf:read_grandf",
    "ade": ".ade:read_ade",
    "aurora": ".aurora:read_aurora",
    "aurora-counting": ".counting:read_aurora_counting",
    "instances": ".counting:read_instances",
    "counterfactual": ".counterfactual:read_counterfactual",
}

# Those of referring expressions give, besides records, the items that the joint set is made of.
ITEMS = {
    "refer": ".refer:refer_items",
    "refcoco-parquet": ".refcoco_parquet:refcoco_parquet_items",
    "grefcoco": ".grefcoco:grefcoco_items",
}
