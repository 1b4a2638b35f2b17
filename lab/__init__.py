"""Everything around the stages that a reader of the paper need not open."""
