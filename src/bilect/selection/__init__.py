"""From models to scores, from scores to what is kept: out of core, by doc_id."""
