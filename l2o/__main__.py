"""``python -m l2o COMMAND ...``; see `meta_train.cli`."""

from meta_train.cli import main

main()
