"""From the command line to objects: composing, building, and assembling a run."""
