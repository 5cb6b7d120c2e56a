"""Meta-parameters of other projects: their files, their names, and the rules of ours that they belong to."""
